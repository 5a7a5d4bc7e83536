"""A device that is not there: its tensors are computed on the CPU, but may not be mixed with the CPU's own.

What would fail on a GPU because a tensor was left behind fails here too, and `waits` counts what would make the host
and a GPU wait for each other. Nothing can be said here of kernels or of speed.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Module(_DummyBackendModule):
    """What stands at torch.pretend."""

    def get_rng_state(self, device=None):  # random numbers are the CPU's
        return None

    def set_rng_state(self, state, device=None):
        pass


NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME, backend_module=Module())
aten = torch.ops.aten

ACROSS = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # a GPU takes indices from the host
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
waits: Counter = Counter()


def is_there(device) -> bool:
    return device is not None and torch.device(device).type == NAME


class Pretended(torch.Tensor):
    """A tensor on the device that is not there; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self, *, tensor_contents=None):
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, classes, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def numpy(self, *, force=False):
        raise TypeError("can't convert a tensor on another device to numpy")

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert a tensor on another device to numpy")

    def tolist(self):
        waits["tolist"] += 1
        return self.held.tolist()


def mapped(change, value):
    """The arguments or results of an operator with `change` in the place of everything in them."""
    if isinstance(value, (list, tuple)):  # torch's own tree_map took half of the time of these tests
        return type(value)([mapped(change, x) for x in value])
    if isinstance(value, dict):
        return {name: mapped(change, x) for name, x in value.items()}
    return change(value)


def tensors_of(values):
    """The tensors among the arguments of an operator."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def compute(function, args, kwargs):
    """Runs an operator on the CPU; its result is where the operator's would be."""
    tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
    there = [x for x in tensors if isinstance(x, Pretended)]
    here = [x for x in tensors if not isinstance(x, Pretended) and x.dim()]
    asked = kwargs.get("device")
    if there and here and function not in ACROSS and not (function in INDEXED and isinstance(args[0], Pretended)):
        raise RuntimeError(f"{function}: expected tensors on one device, got {[str(x.device) for x in tensors]}")
    chosen = function is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
    if (function in WAITS or chosen) and there:  # a GPU counts a mask's places and says how many
        waits[str(function)] += 1
    if function is aten._to_copy.default and asked is not None and is_there(asked) != bool(there):
        waits["copied across"] += 1
    plain_args, plain_kwargs = mapped(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = function(*plain_args, **plain_kwargs)
    if function is aten.copy_.default:
        there = [x for x in args[:1] if isinstance(x, Pretended)]
    given = {id(x.held): x for x in there}
    goes_there = bool(there) if asked is None else is_there(asked)

    def placed(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, Pretended):
            return x
        return given[id(x)] if id(x) in given else Pretended(x) if goes_there else x

    return mapped(placed, result)


class Factories(TorchDispatchMode):
    """New tensors that are asked for there are made there."""

    def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_of((*args, *kwargs.values()))
        if is_there(kwargs.get("device")) or any(isinstance(x, Pretended) for x in given):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    waits["an index from a list"] += 1
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    source, target_held = (x.held if isinstance(x, Pretended) else x for x in (source, target))
    target_held.copy_(source)
    return target


# What indexing by a list does below the dispatch mode.
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")


_makers = torch.tensor, torch.as_tensor


@contextmanager
def device():
    """Inside the block tensors can be made on the device, and autocast does nothing there."""
    kept = torch.tensor, torch.as_tensor, torch.autocast

    def there(make):
        def made(*args, device=None, **kwargs):
            out = make(*args, **kwargs)
            if not is_there(device):
                return out if device is None else out.to(device)
            waits["a tensor from numbers"] += 1
            return Pretended(out)

        return made

    torch.tensor, torch.as_tensor = map(there, _makers)
    torch.autocast = lambda kind, *args, **kwargs: nullcontext() if kind == NAME else kept[2](kind, *args, **kwargs)
    try:
        with Factories():
            yield
    finally:
        torch.tensor, torch.as_tensor, torch.autocast = kept


def on_the_host(function):
    """`function`, as it is outside of `device`: loading makes tensors in ways of its own."""

    def call(*args, **kwargs):
        kept = torch.tensor, torch.as_tensor
        torch.tensor, torch.as_tensor = _makers
        try:
            with _disable_current_modes():
                return function(*args, **kwargs)
        finally:
            torch.tensor, torch.as_tensor = kept

    return call


def move(pipe):
    """The pipeline's weights go there."""
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(Pretended(parameter.data), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Pretended(buffer)
    return pipe

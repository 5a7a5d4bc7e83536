"""Calls that repeat. Checks and launch parameters depend on the arguments' dtypes, shapes, strides, alignment and
numbers, so a call like an earlier one goes straight to its prepared launch, or on a CPU to plain PyTorch.

What is found here was checked when it was stored. Only what can differ between calls of one key is looked at again:
derivatives, debug mode, and the memory that is written; on a CPU the values of tensors too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import checks, derivatives

Args = tuple[Any, ...]
_LIMIT = 4096  # keys hold shapes and strides, so every size of image adds some
MISSED: Any = object()
WRITES = frozenset(("scatter_tokens", "qk_norm_rope"))  # into tensors of the caller; see also `Ready.out`
_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Ready:
    """What runs a call: a prepared launch, or plain PyTorch, which looks at values and memory itself.

    apart: addresses at which the tensors of a launch were found to share no memory that is written.
    """

    __slots__ = ("apart", "call")

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.apart: set[Args] = set()


_FOUND: dict[Args, Ready] = {}


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def place() -> int:
    """The current device, on which kernels are loaded and launched."""
    return torch.cuda.current_device()


def eager() -> bool:
    """Whether nothing watches PyTorch's dispatcher: no compiler, tracer, mode or transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )


def plain(args: Args) -> bool:
    """Whether no tensor is a subclass, which may have an implementation of its own."""
    for arg in args:  # noqa: SIM110 - every call asks, and a generator takes several times as long
        if type(arg) not in _TENSORS and isinstance(arg, torch.Tensor):
            return False
    return True


def can_repeat(tensor: Any) -> bool:
    """Whether calls with this first argument are remembered: those of plain tensors on a GPU or a CPU."""
    return type(tensor) in _TENSORS and (on_gpu(tensor) or tensor.is_cpu) and eager()


def _key(name: str, args: Args) -> Args:
    if not on_gpu(args[0]):
        looked_at = [(arg.dtype, arg.shape, arg.stride(), arg.device) if type(arg) in _TENSORS else arg for arg in args]
        return (name, *looked_at)
    described = [
        (arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & 15, arg.get_device()) if type(arg) in _TENSORS else arg
        for arg in args
    ]
    return (name, place(), *described)


def _addresses(args: Args) -> Args:
    return tuple([arg.data_ptr() if type(arg) in _TENSORS else None for arg in args])


def repeat(name: str, args: Args, check_memory: Callable[[str, Args], None]) -> Any:
    """The result of a call like one that was remembered, or MISSED. The first argument is a tensor."""
    if torch.compiler.is_compiling() or not can_repeat(args[0]):
        return MISSED
    gpu = on_gpu(args[0])
    try:
        found = _FOUND.get(_key(name, args))
    except (TypeError, RuntimeError):  # an argument of a wrong type, or a tensor without memory
        return MISSED
    if found is None or derivatives.needed(args):
        return MISSED
    if not gpu:
        return found.call(*args)
    if checks.debug_enabled():
        return MISSED
    if name in WRITES or name.endswith("_out"):
        where = _addresses(args)
        if where not in found.apart:
            check_memory(name, args)
            _forget_if_full(found.apart)
            found.apart.add(where)
    return found.call(*args)


def remember(name: str, args: Args, call: Callable[..., Any]) -> None:
    """Store what runs a call that was checked."""
    if can_repeat(args[0]) and plain(args):
        _forget_if_full(_FOUND)
        _FOUND[_key(name, args)] = Ready(call)


def forget() -> None:
    """Forget every call."""
    _FOUND.clear()


def _forget_if_full(found: dict[Any, Any] | set[Any]) -> None:
    if len(found) >= _LIMIT:
        found.clear()

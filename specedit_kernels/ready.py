"""Calls that repeat. Checks and launch parameters depend on the arguments' dtypes, shapes, strides, alignment and
numbers, so a call like an earlier one goes straight to its prepared launch.

What is found here was checked when it was stored. Only what can differ between calls of one key is looked at again:
derivatives, debug mode, and the memory that is written.
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
    """A prepared launch, and the addresses at which its tensors were found to share no memory that is written."""

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
    return all(type(arg) in _TENSORS for arg in args if isinstance(arg, torch.Tensor))


def _key(name: str, args: Args) -> Args:
    described = [
        (arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & 15, arg.get_device()) if type(arg) in _TENSORS else arg
        for arg in args
    ]
    return (name, place(), *described)


def _addresses(args: Args) -> Args:
    return tuple([arg.data_ptr() if type(arg) in _TENSORS else None for arg in args])


def repeat(name: str, args: Args, check_memory: Callable[[str, Args], None]) -> Any:
    """The result of a call like one that was remembered, or MISSED. The first argument is a tensor."""
    if torch.compiler.is_compiling() or type(args[0]) not in _TENSORS or not on_gpu(args[0]) or not eager():
        return MISSED
    try:
        found = _FOUND.get(_key(name, args))
    except (TypeError, RuntimeError):  # an argument of a wrong type, or a tensor without memory
        return MISSED
    if found is None or derivatives.needed(args) or checks.debug_enabled():
        return MISSED
    if name in WRITES or name.endswith("_out"):
        where = _addresses(args)
        if where not in found.apart:
            check_memory(name, args)
            _forget_if_full(found.apart)
            found.apart.add(where)
    return found.call(*args)


def remember(name: str, args: Args, call: Callable[..., Any]) -> None:
    """Store the prepared launch of a call that was checked."""
    if eager() and plain(args) and on_gpu(args[0]):
        _forget_if_full(_FOUND)
        _FOUND[_key(name, args)] = Ready(call)


def forget() -> None:
    """Forget every call."""
    _FOUND.clear()


def _forget_if_full(found: dict[Any, Any] | set[Any]) -> None:
    if len(found) >= _LIMIT:
        found.clear()

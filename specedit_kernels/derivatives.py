"""Detect calls that need derivatives, and raise for kernels without any.

Plain PyTorch gives every derivative through the operations inside. The operators of `torch.library` and the Triton
kernels have no formulas of their own, so a call that needs one must either take plain PyTorch or raise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether the call runs inside grad, jvp or vmap of `torch.func`; torch.compile tracks those itself."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode_possible() -> bool:
    """Whether some tensor may carry a tangent; a cheap test that inspects no tensor."""
    return not torch.compiler.is_dynamo_compiling() and (forward_ad._current_level >= 0 or transforms_active())


def _layers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor and those that it wraps, one per `torch.func` transform around the call."""
    yield tensor
    while transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether this tensor is batched by vmap, at any level of nested transforms."""
    return transforms_active() and any(torch._C._functorch.is_batchedtensor(layer) for layer in _layers(tensor))


def _has_gradient(args: tuple[object, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def _has_tangent(args: tuple[object, ...]) -> bool:
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return any(
        forward_ad.unpack_dual(layer).tangent is not None
        for arg in args if isinstance(arg, torch.Tensor)
        for layer in _layers(arg) if not torch._C._functorch.is_batchedtensor(layer)
    )  # fmt: skip


def needed(args: tuple[object, ...]) -> bool:
    """Whether any argument is differentiated, in reverse or forward mode."""
    return _has_gradient(args) or _has_tangent(args)


def refuse(name: str, args: tuple[object, ...], who: str = "Triton kernels") -> None:
    """Raise if a Triton kernel, or what else `who` names, would lose a derivative.

    Raises:
        RuntimeError: an argument requires a gradient or carries a tangent.
    """
    if _has_tangent(args):
        raise RuntimeError(
            f"{name}: expected no forward-mode derivative, got a tensor with a tangent; {who} are not "
            'differentiable in forward mode, use backend="torch"'
        )
    if _has_gradient(args):
        raise RuntimeError(
            f"{name}: expected torch.no_grad(), got a tensor that requires a gradient, which {who} do not "
            'give; backend="torch" does'
        )

"""Merged attention as a `torch.library` operator."""

from __future__ import annotations

from typing import Any

import torch

from . import derivatives, merged, ops
from .key_groups import KeyGroups


def _merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_bias: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    values: list[float] | None = None,
    rows: list[torch.Tensor] | None = None,
    ends: list[torch.Tensor] | None = None,
    complete: list[bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_bias, scale, return_lse)
    ops.check_values("merged", "mixed_attention", args)
    groups = None
    if values is not None:
        groups = KeyGroups(tuple(values), tuple(rows or ()), tuple(ends or ()), tuple(complete or ()), k.shape[0])
    return merged.mixed_attention(*args, groups=groups)


# One operator for every device, so that torch.compile does not look inside, where the bias's values decide.
ops.LIBRARY.define(
    "merged_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q,"
    " Tensor? key_bias, Scalar? scale, bool return_lse, float[]? values=None, Tensor[]? rows=None, Tensor[]? ends=None,"
    " bool[]? complete=None) -> (Tensor, Tensor)"
)
ops.LIBRARY.impl("merged_attention", _merged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{ops.NAMESPACE}::merged_attention", lib=ops.LIBRARY)  # type: ignore[untyped-decorator]
def _merged_attention_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.mixed_attention_fake(*args[:9])


def merged_attention(name: str, args: tuple[Any, ...], groups: KeyGroups | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `mixed_attention`, or its twin `mixed_attention_out`, by passes of PyTorch's fused attention."""
    ops.check_memory(name, args)
    derivatives.refuse("mixed_attention", args, "merged passes")
    if derivatives.transforms_active():
        raise RuntimeError('mixed_attention: expected no torch.func transform with backend="merged", got one')
    parts = () if groups is None else (groups.values, groups.rows, groups.ends, groups.complete)
    grouped = [list(part) for part in parts]
    found: tuple[torch.Tensor, torch.Tensor] = getattr(torch.ops, ops.NAMESPACE).merged_attention(*args[:9], *grouped)
    if name == "mixed_attention_out":
        ops.copy_into(args[-2:], found)
    return found

"""Plans of attention over packed sequences: what depends on their lengths alone, made once for many calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import checks, ops, ready, verdict


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The `plan` of `mixed_attention`, made by `plan` for sequences of some lengths.

    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32. key_bias: (T_k,) float32, or None. query_tiles: the order of query
    blocks of `tile_rows` queries, (capacity, 2) int32, or None where no kernel uses one. A call whose tensors lead to
    other blocks makes an order of its own.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_bias: torch.Tensor | None = None
    query_tiles: torch.Tensor | None = None
    tile_rows: int = 0

    def complete(
        self,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen_q: int | None,
        key_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The plan's cu_seqlens and bias, with those of the call where the plan has none.

        Raises:
            ValueError: the call has what the plan has too.
        """
        given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q}
        if self.key_bias is not None:
            given["key_bias"] = key_bias
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected None with a plan, which has it, got a value")
        return self.cu_seqlens_q, self.cu_seqlens_k, key_bias if self.key_bias is None else self.key_bias

    def to(self, device: torch.device | str | int, **how: Any) -> AttentionPlan:
        """A copy with every tensor moved, or itself where all are there already."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device, **how) for name, x in tensors.items() if isinstance(x, torch.Tensor)
        }
        return self if all(moved[name] is tensors[name] for name in moved) else replace(self, **moved)


def plan(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    total_q: int,
    total_k: int,
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    areas: torch.Tensor | None = None,
    backend: str | None = None,
) -> AttentionPlan:
    """Plan `mixed_attention` over packed sequences once, for all calls that share their lengths.

    A call without a plan orders its query blocks anew, in a small launch of its own before the attention. Nothing is
    read on the host. Not for use inside torch.compile; a compiled call may be given a plan.

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, as `mixed_attention` takes them.
        total_q, total_k: rows of the packed queries and keys, T_q and T_k.
        head_dim, dtype: of the queries that will come.
        max_seqlen_q: at least the longest query sequence. Optional: it makes the launch grid smaller.
        key_bias: (T_k,) float32, the bias of every key, or None; a call may then bring its own.
        areas: (T_k,) float, how many positions each key stands for, instead of a bias: `key_bias = log(areas)`.
        backend: "triton", "torch" or None (by device); of the calls that will come.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or devices that do not fit, both areas and key_bias, or an unknown backend.
    """
    if backend is not None and backend not in checks.BACKENDS:
        raise ValueError(f"backend: expected one of {checks.BACKENDS} or None, got {backend!r}")
    if areas is not None:
        if key_bias is not None:
            raise ValueError("areas: expected None with a key_bias, got both")
        checks.expect_tensor("areas", areas, dtypes=checks.FLOATS, dims=(1,), device=cu_seqlens_k.device)
        key_bias = areas.float().log()
    # A tensor of the queries' shape has no memory: only checks look at it.
    q, k = (torch.empty((rows, 1, head_dim), dtype=dtype, device="meta") for rows in (total_q, total_k))
    on_meta = [None if x is None else x.to("meta") for x in (cu_seqlens_q, cu_seqlens_k, key_bias)]
    checks.check_attention(q, k, k, on_meta[0], on_meta[1], max_seqlen_q, on_meta[2], None)
    for name, offsets, total in (("cu_seqlens_q", cu_seqlens_q, total_q), ("cu_seqlens_k", cu_seqlens_k, total_k)):
        checks.check_cu_seqlens_values(name, offsets, total, max_seqlen_q if name == "cu_seqlens_q" else None)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    key_bias = None if key_bias is None else key_bias.contiguous()
    chosen = verdict.backend_for("mixed_attention", (cu_seqlens_q,)) if ready.on_gpu(cu_seqlens_q) else "torch"
    if (backend or chosen) != "triton":
        return AttentionPlan(cu_seqlens_q, cu_seqlens_k, key_bias)
    ops.check_triton()
    from . import gpu

    tiles, rows = gpu.plan(cu_seqlens_q, cu_seqlens_k, total_q, total_k, max_seqlen_q, head_dim, dtype)
    return AttentionPlan(cu_seqlens_q, cu_seqlens_k, key_bias, tiles, rows)

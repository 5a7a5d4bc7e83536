"""Plans of attention: what depends on lengths and biases alone, made once for many calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch

from . import checks, ops, ready, verdict


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The `plan` of `mixed_attention`, made by `plan` for sequences of some lengths.

    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, or None of dense batches. key_bias: (T_k,) or (B, N_k) float32, or None.

    The rest is for the kernels, None or 0 where none uses it. query_tiles: the order of query blocks of `tile_rows`
    queries, (capacity, 2) int32; a call whose tensors lead to other blocks makes an order of its own. key_order,
    key_counts, tile_bias: which blocks of `tile_keys` keys have one bias; a call with other blocks adds it per key.
    """

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    key_bias: torch.Tensor | None = None
    query_tiles: torch.Tensor | None = None
    tile_rows: int = 0
    key_order: torch.Tensor | None = None
    key_counts: torch.Tensor | None = None
    tile_bias: torch.Tensor | None = None
    tile_keys: int = 0

    @property
    def arguments(self) -> tuple[torch.Tensor | int | None, ...]:
        """What the operator takes of it beside cu_seqlens and bias."""
        return self.query_tiles, self.tile_rows, self.key_order, self.key_counts, self.tile_bias, self.tile_keys

    def complete(
        self,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen_q: int | None,
        key_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
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
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
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
    """Plan `mixed_attention` once, for all calls that share their lengths and biases.

    Without a plan, a packed call orders its query blocks anew, in a small launch of its own before the attention, and a
    bias is added to every logit. With one, blocks of keys that share a bias have it added once a row, so that a bias
    which is constant over long runs of keys costs nothing. Nothing is read on the host. Not for use inside
    torch.compile; a compiled call may be given a plan.

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, as `mixed_attention` takes them; None for dense batches.
        total_q, total_k: rows of the packed queries and keys, T_q and T_k; N_q and N_k of dense ones.
        head_dim, dtype: of the queries that will come.
        max_seqlen_q: at least the longest query sequence. Optional: it makes the launch grid smaller.
        key_bias: (T_k,) or (B, N_k) float32, the bias of every key, or None; a call may then bring its own. The plan
            keeps the tensor, whose values must not change.
        areas: (T_k,) or (B, N_k) float, how many positions each key stands for, instead of a bias:
            `key_bias = log(areas)`.
        backend: "triton", "merged", "torch" or None (by device); of the calls that will come.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or devices that do not fit, neither cu_seqlens nor a bias, both areas and key_bias, or an
            unknown backend.
    """
    if backend is not None and backend not in checks.BACKENDS:
        raise ValueError(f"backend: expected one of {checks.BACKENDS} or None, got {backend!r}")
    if areas is not None:
        if key_bias is not None:
            raise ValueError("areas: expected None with a key_bias, got both")
        checks.expect_tensor("areas", areas, dtypes=checks.FLOATS, dims=(1, 2))
        key_bias = areas.float().log()
    on = cu_seqlens_k if cu_seqlens_k is not None else key_bias
    if on is None:
        raise ValueError("key_bias: expected a bias or areas without cu_seqlens, got neither: nothing is to be planned")
    _check(cu_seqlens_q, cu_seqlens_k, total_q, total_k, head_dim, dtype, max_seqlen_q, key_bias)
    cu_q, cu_k, bias = (None if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k, key_bias))
    chosen = verdict.backend_for("mixed_attention", (on,)) if ready.on_gpu(on) else "torch"
    if (backend or chosen) != "triton":
        return AttentionPlan(cu_q, cu_k, bias)
    ops.check_triton()
    from . import gpu

    pingpong = verdict.uses_pingpong(on.device)
    made: Any = gpu.plan(cu_q, cu_k, bias, total_q, total_k, max_seqlen_q, head_dim, dtype, pingpong)
    return AttentionPlan(cu_q, cu_k, bias, *made)


def _check(
    cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, total_q: int, total_k: int, head_dim: int, dtype: torch.dtype,
    max_seqlen_q: int | None, key_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raise as a call with these would. Tensors like its queries have no memory, since only shapes are looked at."""
    for name, value in (("total_q", total_q), ("total_k", total_k), ("head_dim", head_dim)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    lead = () if cu_q is not None or key_bias is None or key_bias.dim() != 2 else (key_bias.shape[0],)
    q, k = (torch.empty((*lead, rows, 1, head_dim), dtype=dtype, device="meta") for rows in (total_q, total_k))
    on_meta = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (cu_q, cu_k, key_bias)
    ]
    checks.check_attention(q, k, k, on_meta[0], on_meta[1], max_seqlen_q, on_meta[2], None)
    for name, offsets, total in (("cu_seqlens_q", cu_q, total_q), ("cu_seqlens_k", cu_k, total_k)):
        if offsets is not None:
            checks.check_cu_seqlens_values(name, offsets, total, max_seqlen_q if name == "cu_seqlens_q" else None)
            if key_bias is not None and key_bias.device != offsets.device:
                raise ValueError(f"key_bias: expected device {offsets.device}, got {key_bias.device}")

"""RMSNorm, rotary embedding and scatter of queries and keys in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .prepared import Launch


@triton.jit
def _place(target, values, token, head, in_rows, out_index, out_tokens, target_token, target_head, target_dim,
           DIM: tl.constexpr, DIM_P2: tl.constexpr, INDEXED: tl.constexpr):  # fmt: skip
    """Stores rows [BR, D] at their own tokens, or at out_index[token] if it is in range."""
    d = tl.arange(0, DIM_P2)
    row = token
    if INDEXED:
        row = tl.load(out_index + token, mask=in_rows, other=-1)
        in_rows = in_rows & (row >= 0) & (row < out_tokens)
    offsets = (row.to(tl.int64) * target_token + head * target_head)[:, None] + d[None, :] * target_dim  # [BR, D]
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=in_rows[:, None] & (d < DIM)[None, :])


@triton.jit
def _read(source, token, head, in_rows, source_token, source_head, source_dim, DIM: tl.constexpr, DIM_P2: tl.constexpr):
    d = tl.arange(0, DIM_P2)
    offsets = (token.to(tl.int64) * source_token + head * source_head)[:, None] + d[None, :] * source_dim  # [BR, D]
    return tl.load(source + offsets, mask=in_rows[:, None] & (d < DIM)[None, :], other=0)


@triton.jit
def _norm_rotate(x, weight, cosines, sines, eps, weight_dim, DIM: tl.constexpr, DIM_P2: tl.constexpr,
                 RESCALED: tl.constexpr):  # fmt: skip
    """y = x * rsqrt(mean(x^2) + eps) * weight, then (y0, y1) -> (y0 cos - y1 sin, y1 cos + y0 sin) per pair.

    RESCALED divides by the largest value first, so that squares of tiny values do not underflow when eps is 0.
    """
    d = tl.arange(0, DIM_P2)
    x = x.to(tl.float32)
    if RESCALED:
        peak = tl.max(tl.abs(x), axis=1)  # [BR]
        peak = tl.where((peak == 0) | (peak == float("inf")), 1.0, peak)
        x = x / peak[:, None]
        eps = eps / peak / peak
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)  # [BR]
    w = tl.load(weight + d * weight_dim, mask=d < DIM, other=0).to(tl.float32)
    y = x * scale[:, None] * w[None, :]  # [BR, D]
    even, odd = tl.split(tl.reshape(y, (y.shape[0], DIM_P2 // 2, 2)))  # [BR, D/2] each
    rotated = tl.join(even * cosines - odd * sines, odd * cosines + even * sines)  # [BR, D/2, 2]
    return tl.reshape(rotated, (y.shape[0], DIM_P2))


@triton.jit(do_not_specialize=["tokens", "out_tokens", "eps"], do_not_specialize_on_alignment=["out_index"])
def norm_rope(
    q, k, v, q_weight, k_weight, cos, sin, out_index, q_out, k_out, v_out, tokens, out_tokens, eps,
    q_sample, q_token, q_head, q_dim, k_sample, k_token, k_head, k_dim, v_sample, v_token, v_head, v_dim,
    qo_sample, qo_token, qo_head, qo_dim, ko_sample, ko_token, ko_head, ko_dim, vo_sample, vo_token, vo_head, vo_dim,
    q_weight_dim, k_weight_dim, angle_sample,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_ROWS: tl.constexpr, INDEXED: tl.constexpr,
    RESCALED: tl.constexpr,
):  # fmt: skip
    """q_out[b, r(t), h] = rope_t(rmsnorm(q[b, t, h])), k likewise, v copied; r(t) = out_index[t] or t.

    A row is one (token, head). Axis 1 of the grid selects q, k or v, and a program computes BLOCK_ROWS rows of it.
    Neighbouring rows share a token, so its angles are cached.
    """
    tiles = tl.cdiv(tokens * HEADS, BLOCK_ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR]
    token, head = row // HEADS, (row % HEADS).to(tl.int64)  # 64-bit: heads may be a whole sequence apart
    in_rows = token < tokens
    which = tl.program_id(1)
    if which == 2:
        x = _read(v + sample * v_sample, token, head, in_rows, v_token, v_head, v_dim, DIM, DIM_P2)
        _place(v_out + sample * vo_sample, x, token, head, in_rows, out_index, out_tokens, vo_token, vo_head, vo_dim,
               DIM, DIM_P2, INDEXED)  # fmt: skip
    else:
        pair = tl.arange(0, DIM_P2 // 2)
        angles = sample * angle_sample + token.to(tl.int64)[:, None] * (DIM // 2) + pair[None, :]  # [BR, D/2]
        in_angles = in_rows[:, None] & (pair < DIM // 2)[None, :]
        cosines = tl.load(cos + angles, mask=in_angles, other=0)
        sines = tl.load(sin + angles, mask=in_angles, other=0)
        if which == 0:
            x = _read(q + sample * q_sample, token, head, in_rows, q_token, q_head, q_dim, DIM, DIM_P2)
            y = _norm_rotate(x, q_weight, cosines, sines, eps, q_weight_dim, DIM, DIM_P2, RESCALED)
            _place(q_out + sample * qo_sample, y, token, head, in_rows, out_index, out_tokens, qo_token, qo_head,
                   qo_dim, DIM, DIM_P2, INDEXED)  # fmt: skip
        else:
            x = _read(k + sample * k_sample, token, head, in_rows, k_token, k_head, k_dim, DIM, DIM_P2)
            y = _norm_rotate(x, k_weight, cosines, sines, eps, k_weight_dim, DIM, DIM_P2, RESCALED)
            _place(k_out + sample * ko_sample, y, token, head, in_rows, out_index, out_tokens, ko_token, ko_head,
                   ko_dim, DIM, DIM_P2, INDEXED)  # fmt: skip


def prepare_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    out_index: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    tuned: dict[str, launch.Config] | None = None,
) -> Callable[..., None]:
    """What launches the kernel on tensors like these."""
    launch.check_dtype("q", q)
    if q.numel() == 0:
        return lambda *args: None
    rows = [q, k, q if v is None else v, q_out, k_out, q_out if v_out is None else v_out]
    rows = [x if x.dim() == 4 else x[None] for x in rows]  # (B, N, H, D)
    batch, tokens, heads, dim = rows[0].shape
    config = launch.shipped_config("norm_rope", q.device, tuned, head_dim=dim)
    tiles = launch.ceil_div(tokens * heads, config["block_rows"])
    strides = [stride for x in rows for stride in x.stride()]
    strides += q_weight.stride(0), k_weight.stride(0), cos.contiguous().stride(0) if cos.dim() == 3 else 0
    fixed = (
        tokens, rows[3].shape[1], eps, *strides, heads, dim, launch.next_power_of_2(dim), config["block_rows"],
        out_index is not None, eps < torch.finfo(torch.float32).tiny,
    )  # fmt: skip
    start = Launch(norm_rope, (batch * tiles, 2 if v is None else 3, 1), num_warps=config["num_warps"])

    def call(q: Any, k: Any, v: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float, out_index: Any,
             q_out: Any, k_out: Any, v_out: Any) -> None:  # fmt: skip
        if out_index is not None:
            out_index = out_index.contiguous()
        if v is None:
            v, v_out = q, q_out
        start(q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), out_index, q_out, k_out, v_out, *fixed)

    return call

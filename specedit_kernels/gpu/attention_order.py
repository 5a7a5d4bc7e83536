"""Blocks of keys whose bias is the same for all: a plan lists them, and the kernel adds their bias once a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .attention_parts import LOG2_E
from .attention_plan import _span


@triton.jit(do_not_specialize=["keys", "bias_sample"],
            do_not_specialize_on_alignment=["bias", "cu_k", "key_order", "key_counts", "tile_bias"])  # fmt: skip
def order_keys(
    bias, cu_k, key_order, key_counts, tile_bias, keys, bias_sample, bias_key, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """key_order lists the full blocks of sequence b from its slot on: those of one bias first, the others last.

    Blocks that are hidden whole are left out. The slots of a sequence that begins at key s start at s // BLOCK_N, so
    they are its own. tile_bias has the bias of each listed block of the first kind, times log2(e), key_counts (B, 2)
    how many there are of both.
    """
    b = tl.program_id(0)
    start, stop = tl.cast(b, tl.int64) * keys, tl.cast(b + 1, tl.int64) * keys
    bias += tl.cast(b, tl.int64) * bias_sample
    if PACKED:
        first_key, stop_key = _span(cu_k, b, keys)
        start, stop = tl.cast(first_key, tl.int64), tl.cast(stop_key, tl.int64)
        bias += start * bias_key
    slot, tiles = start // BLOCK_N, ((stop - start) // BLOCK_N).to(tl.int32)
    shared, others = 0, 0
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)  # [BT]
        real = tile < tiles
        key = tile.to(tl.int64)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [BT, BN]
        values = tl.load(bias + key * bias_key, mask=real[:, None], other=0) * LOG2_E
        low, high = tl.min(values, axis=1), tl.max(values, axis=1)  # [BT]
        proper = tl.sum((values == values).to(tl.int32), axis=1) == BLOCK_N  # minimum and maximum pass over NaN
        hidden = proper & (high == float("-inf"))
        alike = real & proper & (low == high) & (tl.abs(low) < float("inf"))
        mixed = real & (hidden == 0) & (alike == 0)
        at = slot + shared + tl.cumsum(alike.to(tl.int32), axis=0) - 1
        tl.store(key_order + at, tile, mask=alike)
        tl.store(tile_bias + at, low, mask=alike)
        back = slot + tiles - others - tl.cumsum(mixed.to(tl.int32), axis=0)
        tl.store(key_order + back, tile, mask=mixed)
        shared += tl.sum(alike.to(tl.int32))
        others += tl.sum(mixed.to(tl.int32))
    tl.store(key_counts + 2 * b, shared)
    tl.store(key_counts + 2 * b + 1, others)


@triton.jit
def _tile_counts(key_counts, sequence, tiles):
    """How many blocks of both kinds a sequence of `tiles` full blocks has; clamped, since a plan may be of another."""
    shared = tl.minimum(tl.maximum(tl.load(key_counts + 2 * sequence), 0), tiles)
    others = tl.minimum(tl.maximum(tl.load(key_counts + 2 * sequence + 1), 0), tiles - shared)
    return shared, others


@triton.jit
def _ordered_tile(key_order, tile_bias, slot, i, count, whole, BLOCK_N: tl.constexpr):
    """First key of the i-th of `count` blocks from `slot` on, and its bias. A wrong entry gives another full block."""
    tile = tl.load(key_order + slot + i, mask=i < count, other=0)
    shift = tl.load(tile_bias + slot + i, mask=i < count, other=0)
    return tl.minimum(tl.maximum(tile, 0), whole // BLOCK_N - 1) * BLOCK_N, shift


def order(
    bias: torch.Tensor, cu_k: torch.Tensor | None, block_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """key_order, key_counts and tile_bias of a bias (T_k,) with cu_seqlens, or (B, N_k)."""
    samples, keys = (cu_k.shape[0] - 1, bias.shape[0]) if cu_k is not None else bias.shape
    slots = max(1, launch.ceil_div(bias.numel(), block_n))
    key_order = torch.zeros(slots, dtype=torch.int32, device=bias.device)
    counts = torch.zeros((samples, 2), dtype=torch.int32, device=bias.device)
    tile_bias = torch.zeros(slots, dtype=torch.float32, device=bias.device)
    if samples:
        strides = (0, bias.stride(0)) if cu_k is not None else bias.stride()
        order_keys[(samples,)](
            bias, cu_k, key_order, counts, tile_bias, keys, *strides, PACKED=cu_k is not None, BLOCK_N=block_n,
            BLOCK_T=16, num_warps=4,
        )  # fmt: skip
    return key_order, counts, tile_bias

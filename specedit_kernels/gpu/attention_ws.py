"""The warp-specialised attention kernel: some warps load tiles through TMA while the others compute.

The compiler splits the main loop (`warp_specialize=True`). It requires four warps, every load by descriptor (the bias
too), no early return and no matrix product outside the loop. So the last, partial block of keys is masked inside the
loop, by a bias of -inf. Past the last key a descriptor reads zeros, which the mask removes. In a packed batch it would
read the next sequence's rows, so this kernel takes dense batches only.

It runs where a file of launch parameters lists it under `attention_ws`. A null `config` there excludes shapes at which
it was slower. No default lists it until it is measured to be faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .attention_parts import LOG2_E, _attend_block, _store_rows

# Padded head dims that are tuned and whose tiles fit four warps. Another head dim's entry would not fit.
SPECIALIZED_DIMS = (64, 128)


@triton.jit(do_not_specialize=["tiles", "queries", "keys", "scale_log2"])
def attend_specialized(
    q_desc, k_desc, v_desc, bias_desc, out, lse, tiles, heads, group, queries, keys, scale_log2,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale * q_i . k_j + bias_j),  lse_i = log sum_j p_ij

    As `attend` on dense batches: one program per query block and head, and `group` query heads share a key head.
    """
    first = (tl.program_id(0) % tiles) * BLOCK_M
    sample = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    n = tl.arange(0, BLOCK_N)  # [BN]
    kv_head = head // group
    query = q_desc.load([sample, head, first, 0]).reshape(BLOCK_M, DIM_P2)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_P2), tl.float32)
    for start in tl.range(0, keys, BLOCK_N, warp_specialize=True):
        key = k_desc.load([sample, kv_head, start, 0]).reshape(BLOCK_N, DIM_P2)
        bias_row = tl.where(start + n < keys, 0.0, float("-inf"))  # [BN]
        if HAS_BIAS:
            bias_row += bias_desc.load([sample, start]).reshape(BLOCK_N) * LOG2_E
        value = v_desc.load([sample, kv_head, start, 0]).reshape(BLOCK_N, DIM_P2)
        peak, total, acc = _attend_block(query, key, value, bias_row, n < BLOCK_N, peak, total, acc, scale_log2,
                                         True, True, False, "tf32")  # fmt: skip
    _store_rows(out, lse, peak, total, acc, sample, head, first, queries, queries, heads, DIM, DIM_P2, BLOCK_M,
                HAS_LSE)  # fmt: skip


def bias_descriptor(bias: torch.Tensor, block_n: int) -> TensorDescriptor:
    """A TMA descriptor over a bias (B, N_k), which is copied only if its rows are not aligned to 16 bytes."""
    batch, keys = bias.shape
    row = 4 * launch.ceil_div(keys, 4)
    fits = bias.data_ptr() % 16 == 0 and bias.stride(1) == 1
    if batch > 1 and fits:
        fits, row = bias.stride(0) > 0 and bias.stride(0) % 4 == 0, bias.stride(0)
    if not fits:
        row = 4 * launch.ceil_div(keys, 4)
        padded = torch.empty((batch, row), dtype=bias.dtype, device=bias.device)[:, :keys]
        bias = padded.copy_(bias)
    return TensorDescriptor(bias, [batch, keys], [row, 1], [1, block_n])

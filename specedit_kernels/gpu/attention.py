"""Non-causal attention over packed or dense sequences with a bias per key: FlashAttention's forward pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .attention_blocks import BlockLists, _kept_tiles, _tile_start, tile_of
from .attention_parts import LOG2_E, _attend_block, _store_rows
from .attention_ws import SPECIALIZED_DIMS, attend_specialized, bias_descriptor
from .variants import Variants


@triton.jit(do_not_specialize=["sequences", "queries", "keys", "capacity"],
            do_not_specialize_on_alignment=["cu_q", "cu_k", "plan"])  # fmt: skip
def plan_tiles(
    cu_q, cu_k, plan, sequences, queries, keys, capacity,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Orders query blocks by their sequence's number of keys, most first: plan[i] = (sequence, its first block's i).

    Program b places the blocks of sequence b after those of every sequence with more keys; ties go by number. One more
    program fills the rest of the plan with -1. Lengths never leave the device.
    """
    b = tl.program_id(0)
    own_keys = -1
    own_tiles = 0
    if b < sequences:
        q_start, q_stop = _span(cu_q, b, queries)
        k_start, k_stop = _span(cu_k, b, keys)
        own_keys = k_stop - k_start
        own_tiles = tl.cdiv(q_stop - q_start, BLOCK_M)
    first = 0
    for start in range(0, sequences, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)  # [BB]
        real = other < sequences
        tiles = tl.cdiv(_length(cu_q, other, real, queries), BLOCK_M)
        length = _length(cu_k, other, real, keys)
        before = real & ((length > own_keys) | ((length == own_keys) & (other < b)))
        first += tl.sum(tl.where(before, tiles, 0))
    count = own_tiles if b < sequences else capacity - first
    for start in range(0, count, BLOCK_T):
        block = start + tl.arange(0, BLOCK_T)  # [BT]
        at = first + block
        written = (block < count) & (at < capacity)
        tl.store(plan + 2 * at, tl.where(b < sequences, b, -1) + tl.zeros_like(at), mask=written)
        tl.store(plan + 2 * at + 1, first + tl.zeros_like(at), mask=written)


@triton.jit
def _work(pid, plan, cu_q, heads, queries, BLOCK_M: tl.constexpr):
    """The sequence, head and query block of a program; the sequence is -1 past the end of the plan.

    A sequence of n blocks runs in the programs [first * heads, (first + n) * heads). All heads of the longest sequence
    come first. Programs of one head are adjacent, because they read the same keys.
    """
    sequence = tl.load(plan + 2 * (pid // heads))
    first = tl.load(plan + 2 * (pid // heads) + 1)
    q_start, q_stop = _span(cu_q, tl.maximum(sequence, 0), queries)
    blocks = tl.maximum(tl.cdiv(q_stop - q_start, BLOCK_M), 1)
    within = pid - first * heads
    return sequence, within // blocks, within % blocks


@triton.jit
def _length(cu_seqlens, b, mask, total):
    """Lengths of sequences b. Offsets are clamped, so wrong ones never address memory outside the tensors."""
    start = tl.load(cu_seqlens + b, mask=mask, other=0)
    stop = tl.load(cu_seqlens + b + 1, mask=mask, other=0)
    start, stop = tl.minimum(tl.maximum(start, 0), total), tl.minimum(tl.maximum(stop, 0), total)
    return tl.maximum(stop - start, 0)


@triton.jit
def _span(cu_seqlens, b, total):
    """First and last-plus-one row of sequence b, clamped in the same way."""
    start = tl.load(cu_seqlens + b)
    stop = tl.load(cu_seqlens + b + 1)
    start, stop = tl.minimum(tl.maximum(start, 0), total), tl.minimum(tl.maximum(stop, 0), total)
    return start, tl.maximum(stop, start)


@triton.jit
def _rows_before(cu_q, sequence, queries, QUERY_BLOCK: tl.constexpr):
    """Number of query blocks of the sequences before this one, whose lists come first."""
    rows = 0
    for start in range(0, sequence, 128):
        other = start + tl.arange(0, 128)
        rows += tl.sum(tl.cdiv(_length(cu_q, other, other < sequence, queries), QUERY_BLOCK))
    return rows


@triton.jit(do_not_specialize=["tiles", "queries", "keys", "scale_log2", "bias_sample", "list_rows", "listed",
                               "list_sample", "list_head"],
            do_not_specialize_on_alignment=["cu_q", "cu_k", "plan", "block_offsets", "blocks"])  # fmt: skip
def attend(
    q, k, v, q_desc, k_desc, v_desc, bias, out, lse, cu_q, cu_k, plan, tiles, heads, group, queries, keys, scale_log2,
    q_sample, q_row, q_head, q_dim, k_sample, k_row, k_head, k_dim, v_sample, v_row, v_head, v_dim,
    bias_sample, bias_key, block_offsets, blocks, list_rows, listed, list_sample, list_head,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, PLANNED: tl.constexpr, DESCRIPTORS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr, LISTED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale * q_i . k_j + bias_j),  lse_i = log sum_j p_ij

    One program computes one query block of one head over all keys of its sequence. Each `group` of consecutive query
    heads reads the same key head. The last, partial block of keys is handled after the main loop, which needs no mask
    then. Its loads are masked, so rows past the sequence, another sample's, are never read. With DESCRIPTORS, full
    blocks are loaded through TMA. With LISTED, only the key blocks in the query block's list are read, by tiles that
    divide them.
    """
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    sample = 0
    q_start, q_stop = 0, queries
    k_start, k_stop = 0, keys
    if PACKED:
        sequence = 0
        if PLANNED:
            sequence, head, tile = _work(tl.program_id(0), plan, cu_q, heads, queries, BLOCK_M)
        if sequence < 0:
            return
        q_start, q_stop = _span(cu_q, sequence, queries)
        k_start, k_stop = _span(cu_k, sequence, keys)
    else:
        sample = head // heads
        head = head % heads
    first = q_start + tile * BLOCK_M
    if first >= q_stop:
        return

    d = tl.arange(0, DIM_P2)  # [D]
    m = first + tl.arange(0, BLOCK_M)  # [BM]
    n = tl.arange(0, BLOCK_N)  # [BN]
    in_dim = (d < DIM)[None, :]
    sample = tl.cast(sample, tl.int64)
    kv_head = head // group
    k += sample * k_sample + tl.cast(k_start, tl.int64) * k_row + tl.cast(kv_head, tl.int64) * k_head
    v += sample * v_sample + tl.cast(k_start, tl.int64) * v_row + tl.cast(kv_head, tl.int64) * v_head
    if HAS_BIAS:
        bias += sample * bias_sample + tl.cast(k_start, tl.int64) * bias_key
    if DESCRIPTORS:
        query = q_desc.load([sample.to(tl.int32), head, first, 0]).reshape(BLOCK_M, DIM_P2)
    else:
        q += sample * q_sample + tl.cast(head, tl.int64) * q_head
        rows = q + m.to(tl.int64)[:, None] * q_row + d[None, :] * q_dim
        query = tl.load(rows, mask=(m < q_stop)[:, None] & in_dim, other=0)  # [BM, D]

    length = k_stop - k_start
    whole = length // BLOCK_N * BLOCK_N
    steps = whole
    if LISTED:
        row = tile * BLOCK_M // QUERY_BLOCK
        if PLANNED:
            row += _rows_before(cu_q, sequence, queries, QUERY_BLOCK)
        block_offsets += sample * list_sample + tl.cast(head, tl.int64) * list_head
        entry, steps, keeps_tail = _kept_tiles(block_offsets, blocks, row, list_rows, listed, length,
                                               BLOCK_N, KEY_BLOCK)  # fmt: skip
        # Each tile is looked up one iteration ahead: a look-up in its own would cost a stage of the pipeline.
        upcoming = _tile_start(blocks, entry, 0, steps, whole, BLOCK_N, KEY_BLOCK)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_P2), tl.float32)
    bias_row = tl.zeros((BLOCK_N,), tl.float32)
    in_keys = n < BLOCK_N  # [BN]
    if not DESCRIPTORS:
        # Offsets within a block fit 32 bits (`_with_batch` ensures it); the block's own offset is a 64-bit scalar.
        k_offsets = n[:, None] * k_row + d[None, :] * k_dim  # [BN, D]
        v_offsets = n[:, None] * v_row + d[None, :] * v_dim  # [BN, D]
    for start in range(0, steps, BLOCK_N):
        at = start
        if LISTED:
            at = upcoming
            upcoming = _tile_start(blocks, entry, start + BLOCK_N, steps, whole, BLOCK_N, KEY_BLOCK)
        if DESCRIPTORS:
            key = k_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
            value = v_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
        else:
            offset = tl.cast(at, tl.int64)
            if DIM == DIM_P2:
                key = tl.load(k + offset * k_row + k_offsets)
                value = tl.load(v + offset * v_row + v_offsets)
            else:
                key = tl.load(k + offset * k_row + k_offsets, mask=in_dim, other=0)
                value = tl.load(v + offset * v_row + v_offsets, mask=in_dim, other=0)
        if HAS_BIAS:
            bias_row = tl.load(bias + tl.cast(at, tl.int64) * bias_key + n * bias_key) * LOG2_E
        peak, total, acc = _attend_block(query, key, value, bias_row, in_keys, peak, total, acc, scale_log2,
                                         HAS_BIAS, SCALE_FIRST, False, PRECISION)  # fmt: skip
    has_tail = whole < length
    if LISTED:
        has_tail = keeps_tail
    if has_tail:
        in_keys = whole + n < length  # [BN]
        offset = tl.cast(whole, tl.int64)
        # Computed here, so that with descriptors no offsets occupy registers in the main loop.
        k_last = n[:, None] * k_row + d[None, :] * k_dim  # [BN, D]
        v_last = n[:, None] * v_row + d[None, :] * v_dim  # [BN, D]
        key = tl.load(k + offset * k_row + k_last, mask=in_keys[:, None] & in_dim, other=0)
        value = tl.load(v + offset * v_row + v_last, mask=in_keys[:, None] & in_dim, other=0)
        if HAS_BIAS:
            bias_row = tl.load(bias + offset * bias_key + n * bias_key, mask=in_keys, other=0) * LOG2_E
        peak, total, acc = _attend_block(query, key, value, bias_row, in_keys, peak, total, acc, scale_log2,
                                         HAS_BIAS, SCALE_FIRST, True, PRECISION)  # fmt: skip

    _store_rows(out, lse, peak, total, acc, sample, head, first, q_stop, queries, heads, DIM, DIM_P2, BLOCK_M, HAS_LSE)


_ATTEND, _PLAN_TILES = Variants(attend), Variants(plan_tiles)


def _with_batch(tensor: torch.Tensor) -> torch.Tensor:
    """A packed or dense tensor as (B, N, H, D), copied only where its strides would slow the kernel down or break it.

    Rows that cannot be loaded in 16-byte vectors make the kernel spill; a copy is cheap next to attention. Strides of
    2^22 and above could overflow the 32-bit offsets within a block.
    """
    tensor = tensor if tensor.dim() == 4 else tensor[None]
    sample, row, head, channel = tensor.stride()
    # Triton specialises strides that are multiples of 16 elements; TMA needs multiples of 16 bytes.
    vectors = channel == 1 and (sample | row | head) % 16 == 0 and tensor.data_ptr() % 16 == 0
    if row < 1 << 22 and (vectors or _fits_descriptor(tensor)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _fits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether TMA can read the tensor: address and strides aligned to 16 bytes, innermost stride 1."""
    sample, row, head, channel = tensor.stride()
    aligned = (sample | row | head) * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and channel == 1 and sample > 0 and row > 0 and head > 0 and tensor.numel() > 0


def _descriptor(tensor: torch.Tensor, rows: int, dim_p2: int) -> TensorDescriptor:
    """A TMA descriptor over (B, H, N, D) with blocks [1, 1, rows, dim_p2]. Leading unit axes cost nothing."""
    batch, tokens, heads, dim = tensor.shape
    sample, row, head, channel = tensor.stride()
    return TensorDescriptor(tensor, [batch, heads, tokens, dim], [sample, head, row, channel], [1, 1, rows, dim_p2])


def schedule_tiles(cu_q, cu_k, queries: int, keys: int, longest: int | None, block_m: int) -> torch.Tensor:
    """The plan that `plan_tiles` writes, (capacity, 2) int32, large enough for any lengths of these totals."""
    sequences = cu_q.shape[0] - 1
    capacity = queries // block_m + sequences
    if longest is not None:
        capacity = min(capacity, sequences * launch.ceil_div(longest, block_m))
    tiles = torch.empty((capacity, 2), dtype=torch.int32, device=cu_q.device)
    if capacity:
        wide = (queries | keys) >> 31
        _PLAN_TILES.launch(
            (block_m, wide), (sequences + 1, 1, 1),
            (cu_q, cu_k, tiles, sequences, queries, keys, capacity, block_m, 128, 128), num_warps=4,
        )  # fmt: skip
    return tiles


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_bias: torch.Tensor | None,
    scale: float,
    return_lse: bool,
    block_offsets: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    query_block: int = 0,
    key_block: int = 0,
    tuned: dict[str, launch.Config] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    launch.check_dtype("q", q)
    dim = q.shape[-1]
    if dim % 16 or dim > 256:
        raise ValueError(f'q: expected a head dim that is a multiple of 16 up to 256, got {dim}; use backend="torch"')
    if q.dtype == torch.float32 and dim > 128:
        raise ValueError(f'q: expected a head dim up to 128 in float32, got {dim}; use backend="torch"')
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    q4, k4, v4 = (_with_batch(x) for x in (q, k, v))
    batch, queries, heads, _ = q4.shape
    keys = k4.shape[1]
    if out.numel() == 0:
        return out, lse
    lists = None
    if block_offsets is not None and blocks is not None:
        lists = BlockLists(block_offsets, blocks, query_block, key_block)
    group = heads // k4.shape[2]  # Triton specialises 1, so equal head counts cost nothing
    dim_p2 = launch.next_power_of_2(dim)
    sequences = 1 if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1
    shape = {"bits": 8 * q.element_size(), "head_dim": dim_p2, "keys": keys // sequences}
    bias = None if key_bias is None else key_bias if key_bias.dim() == 2 else key_bias[None]
    scale_log2 = scale * math.log2(math.e)
    # On Hopper and newer, half precision loads through TMA where every tensor is aligned for it.
    config = None
    if q.element_size() == 2 and all(_fits_descriptor(x) for x in (q4, k4, v4)):
        if not packed and lists is None and dim_p2 in SPECIALIZED_DIMS:
            config = launch.config("attention_ws", q.device, tuned, **shape)
        if config is not None:
            block_m, block_n = config["block_m"], config["block_n"]
            tiles = launch.ceil_div(queries, block_m)
            attend_specialized[(tiles * heads * batch,)](
                *(_descriptor(x, rows, dim_p2) for x, rows in ((q4, block_m), (k4, block_n), (v4, block_n))),
                None if bias is None else bias_descriptor(bias, block_n), out, lse,
                tiles, heads, group, queries, keys, scale_log2,
                DIM=dim, DIM_P2=dim_p2, BLOCK_M=block_m, BLOCK_N=block_n, HAS_BIAS=bias is not None,
                HAS_LSE=return_lse, num_warps=config["num_warps"], num_stages=config["num_stages"],
            )  # fmt: skip
            return out, lse
        config = launch.config("attention_tma", q.device, tuned, **shape)
    descriptors = config is not None
    if config is None:
        config = launch.shipped_config("attention", q.device, tuned, **shape)
    block_m, block_n = config["block_m"], config["block_n"]
    if lists is not None:
        block_m, block_n = tile_of((query_block, key_block), block_m, block_n)
    tiles = launch.ceil_div(queries, block_m)
    planned = packed and sequences > 1
    table = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if planned:
        table = schedule_tiles(cu_seqlens_q, cu_seqlens_k, queries, keys, max_seqlen_q, block_m)
        tiles = table.shape[0]
    elif packed and max_seqlen_q is not None:
        tiles = min(tiles, launch.ceil_div(max_seqlen_q, block_m))
    if tiles == 0:
        return out, lse
    described: list[TensorDescriptor | None] = [None, None, None]
    if descriptors:
        described = [_descriptor(x, rows, dim_p2) for x, rows in ((q4, block_m), (k4, block_n), (v4, block_n))]
    strides = (*q4.stride(), *k4.stride(), *v4.stride(), *((0, 0) if bias is None else bias.stride()))
    listed = (None,) * 6 if lists is None else lists.arguments()
    switches = (
        dim, dim_p2, block_m, block_n, packed, planned, descriptors, bias is not None,
        bias is not None or not scale > 0, return_lse, "ieee" if q.dtype == torch.float32 else "tf32",
        lists is not None, query_block, key_block,
    )  # fmt: skip
    # Queries, keys, values and outputs are aligned; numbers from 2^31 on are 64-bit arguments.
    entries = 0 if lists is None else lists.blocks.shape[0] | lists.block_offsets.numel()
    wide = (queries | keys | tiles | entries) >> 31
    key = (
        q.dtype, strides, heads, group, switches, config["num_warps"], config["num_stages"], wide,
        bias is not None and bias.data_ptr() % 16,
    )  # fmt: skip
    _ATTEND.launch(
        key, (tiles * heads * batch, 1, 1),
        (q4, k4, v4, *described, bias, out, lse, cu_seqlens_q, cu_seqlens_k, table, tiles, heads, group, queries, keys,
         scale_log2, *strides, *listed, *switches),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return out, lse

"""Non-causal attention over packed or dense sequences with a bias per key: FlashAttention's forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_blocks import _kept_tiles, _tile_start
from .attention_order import _ordered_tile, _tile_counts
from .attention_parts import LOG2_E, _attend_block, _store_rows
from .attention_plan import _rows_before, _span, _work
from .attention_split import _share, _store_part


@triton.jit
def _load_tile(rows, at, row_stride, offsets, in_dim, WHOLE_DIM: tl.constexpr):
    """The block of keys or values [BN, D] that begins at row `at`."""
    if WHOLE_DIM:
        tile = tl.load(rows + tl.cast(at, tl.int64) * row_stride + offsets)
    else:
        tile = tl.load(rows + tl.cast(at, tl.int64) * row_stride + offsets, mask=in_dim, other=0)
    return tile


@triton.jit(do_not_specialize=["tiles", "queries", "keys", "scale_log2", "bias_sample", "list_rows", "listed",
                               "list_sample", "list_head", "split_from", "parts"],
            do_not_specialize_on_alignment=["cu_q", "cu_k", "plan", "block_offsets", "blocks", "key_order",
                                            "key_counts", "tile_bias"])  # fmt: skip
def attend(
    q, k, v, q_desc, k_desc, v_desc, bias, out, lse, cu_q, cu_k, plan, tiles, heads, group, queries, keys, scale_log2,
    q_sample, q_row, q_head, q_dim, k_sample, k_row, k_head, k_dim, v_sample, v_row, v_head, v_dim,
    bias_sample, bias_key, block_offsets, blocks, list_rows, listed, list_sample, list_head,
    key_order, key_counts, tile_bias, sums, statistics, split_from, parts,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, PLANNED: tl.constexpr, DESCRIPTORS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr, LISTED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, ORDERED: tl.constexpr, MASKED_TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale * q_i . k_j + bias_j),  lse_i = log sum_j p_ij

    One program computes one query block of one head over all keys of its sequence. Each `group` of consecutive query
    heads reads the same key head. The last, partial block of keys is handled after the main loop, which needs no mask
    then. Its loads are masked, so rows past the sequence, another sample's, are never read. With DESCRIPTORS, full
    blocks are loaded through TMA. With LISTED, only the key blocks in the query block's list are read, by tiles that
    divide them. With ORDERED, a plan lists the blocks whose keys share a bias: a loop of their own adds it per row.
    With MASKED_TAIL, the partial block is masked inside the main loop instead, which then masks every block. With
    SPLIT, every query block from `split_from` on has `parts` programs, each of which takes some of the keys.
    """
    program = tl.program_id(0)
    part, shares = 0, 1
    if SPLIT:
        unit = program - split_from  # negative: a program of its own
        if unit >= 0:
            program, part, shares = split_from + unit // parts, unit % parts, parts
    tile = program % tiles
    head = program // tiles
    sample = 0
    q_start, q_stop = 0, queries
    k_start, k_stop = 0, keys
    if PACKED:
        sequence = 0
        if PLANNED:
            sequence, head, tile = _work(program, plan, cu_q, heads, queries, BLOCK_M)
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
    if ORDERED:
        mine = sample.to(tl.int32)
        if PACKED:
            mine = sequence
        slot = (tl.cast(sample, tl.int64) * keys + k_start) // BLOCK_N
        shared, others = _tile_counts(key_counts, mine, whole // BLOCK_N)
        others_at = slot + whole // BLOCK_N - others
        begin, end = 0, shared
        if SPLIT:
            begin, end = _share(shared, part, shares)
        upcoming, rise = _ordered_tile(key_order, tile_bias, slot, begin, shared, whole, BLOCK_N)
        for i in range(begin, end):
            at, shift = upcoming, rise
            upcoming, rise = _ordered_tile(key_order, tile_bias, slot, i + 1, shared, whole, BLOCK_N)
            if DESCRIPTORS:
                key = k_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
                value = v_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
            else:
                key = _load_tile(k, at, k_row, k_offsets, in_dim, DIM == DIM_P2)
                value = _load_tile(v, at, v_row, v_offsets, in_dim, DIM == DIM_P2)
            peak, total, acc = _attend_block(query, key, value, bias_row, in_keys, peak, total, acc, scale_log2, shift,
                                             False, False, False, True, PRECISION)  # fmt: skip
        steps = others * BLOCK_N
    if MASKED_TAIL:
        steps = length
    begin, stop = 0, steps
    if SPLIT:
        begin, end = _share(tl.cdiv(steps, BLOCK_N), part, shares)
        begin, stop = begin * BLOCK_N, tl.minimum(end * BLOCK_N, steps)
    if ORDERED:
        upcoming, rise = _ordered_tile(key_order, tile_bias, others_at, begin // BLOCK_N, others, whole, BLOCK_N)
    for start in range(begin, stop, BLOCK_N):
        at = start
        if MASKED_TAIL:
            in_keys = at + n < length
        if LISTED:
            at = upcoming
            upcoming = _tile_start(blocks, entry, start + BLOCK_N, steps, whole, BLOCK_N, KEY_BLOCK)
        if ORDERED:
            at = upcoming
            upcoming, rise = _ordered_tile(key_order, tile_bias, others_at, start // BLOCK_N + 1, others, whole,
                                           BLOCK_N)  # fmt: skip
        if DESCRIPTORS:
            key = k_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
            value = v_desc.load([sample.to(tl.int32), kv_head, k_start + at, 0]).reshape(BLOCK_N, DIM_P2)
        elif MASKED_TAIL:
            here = in_keys[:, None] & in_dim
            key = tl.load(k + tl.cast(at, tl.int64) * k_row + k_offsets, mask=here, other=0)
            value = tl.load(v + tl.cast(at, tl.int64) * v_row + v_offsets, mask=here, other=0)
        else:
            key = _load_tile(k, at, k_row, k_offsets, in_dim, DIM == DIM_P2)
            value = _load_tile(v, at, v_row, v_offsets, in_dim, DIM == DIM_P2)
        if HAS_BIAS:
            biases = bias + tl.cast(at, tl.int64) * bias_key + n * bias_key
            if MASKED_TAIL:
                bias_row = tl.load(biases, mask=in_keys, other=0) * LOG2_E
            else:
                bias_row = tl.load(biases) * LOG2_E
        peak, total, acc = _attend_block(query, key, value, bias_row, in_keys, peak, total, acc, scale_log2, 0.0,
                                         HAS_BIAS, SCALE_FIRST, MASKED_TAIL, False, PRECISION)  # fmt: skip
    has_tail = whole < length
    if LISTED:
        has_tail = keeps_tail
    if MASKED_TAIL:
        has_tail = False
    if SPLIT:
        has_tail = has_tail & (part == shares - 1)
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
        peak, total, acc = _attend_block(query, key, value, bias_row, in_keys, peak, total, acc, scale_log2, 0.0,
                                         HAS_BIAS, SCALE_FIRST, True, False, PRECISION)  # fmt: skip

    if SPLIT:  # noqa: SIM102 - without it the compiler knows no `unit`
        if unit >= 0:
            _store_part(sums, statistics, unit, peak, total, acc, DIM_P2, BLOCK_M)
            return
    _store_rows(out, lse, peak, total, acc, sample, head, first, q_stop, queries, heads, DIM, DIM_P2, BLOCK_M, HAS_LSE)

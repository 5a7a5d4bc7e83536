"""`attention.attend` for sm_90 in Gluon: one warp loads, two warpgroups take turns on the tensor cores.

FlashAttention-3's ping-pong ([2407.08608](https://arxiv.org/abs/2407.08608), section 3.1): one warpgroup's products run
while the other is in its softmax. Only a GPU's file of launch parameters chooses this kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_order import _tile_counts
from .attention_parts import LOG2_E
from .attention_plan import _span, _work

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8


def tile_layout(dim_p2: int) -> gl.NVMMASharedLayout:
    """How a tile [1, 1, rows, dim_p2] of half-precision rows lies in shared memory."""
    return gl.NVMMASharedLayout(min(128, 2 * dim_p2), 16, 4)


@gluon.jit
def _done(use):
    """The parity with which a wait ends once a barrier's phase number `use`, from 0 on, is complete."""
    return use & 1


@gluon.jit
def _done_before(use):
    """The same of the phase before: for use 0 there is none, and a fresh barrier lets the wait pass."""
    return (use & 1) ^ 1


@gluon.jit
def _listed_key(i, order, whole, BLOCK_N: gl.constexpr):
    """First key of the i-th block that a plan lists. A wrong entry gives another full block of the `whole` ones."""
    key_order, tile_bias, shared_at, shared, others_at = order
    entry = gl.where(i < shared, shared_at + i, others_at + i - shared)
    return gl.minimum(gl.maximum(gl.load(key_order + entry), 0), whole - 1) * BLOCK_N


@gluon.jit
def _load_blocks(
    q_desc, k_desc, v_desc, bias, bias_key, memory, barriers, place, keys, order,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, HAS_BIAS: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """The loading warp: all queries, then keys, biases and values of each block, as slots of the rings become free."""
    q_tiles, k_ring, v_ring, bias_ring = memory
    q_full, k_full, k_empty, v_full, v_empty, turns = barriers
    sample, head, kv_head, first, k_start = place
    length, blocks, first_at, own_first, own_stop = keys
    mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
    for side in gl.static_range(2):
        _copy(q_desc, [sample, head, first + side * ROWS, 0], q_full.index(0), q_tiles.index(side))
    n = gl.arange(0, BLOCK_N, gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0]))  # [BN]
    for i in range(blocks):
        at = first_at
        if i > 0:
            if ORDERED:
                at = _listed_key(i - 1, order, length // BLOCK_N, BLOCK_N)
            else:
                at = (i - 1) * BLOCK_N
        slot = i % STAGES
        use = i // STAGES
        if HAS_BIAS:
            biases = bias + gl.cast(at, gl.int64) * bias_key + n * bias_key
            row = gl.load(biases, mask=at + n < length, other=0) * LOG2_E  # [BN]
        mbarrier.wait(k_empty.index(slot), _done_before(use))
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        _copy(k_desc, [sample, kv_head, k_start + at, 0], k_full.index(slot), k_ring.index(slot))
        if HAS_BIAS:
            bias_ring.index(slot).store(row)
            mbarrier.arrive(k_full.index(slot), count=1)
        mbarrier.wait(v_empty.index(slot), _done_before(use))
        if PACKED and length < BLOCK_N:
            mbarrier.arrive(v_full.index(slot), count=1)  # `_load_short` has stored them
        else:
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            _copy(v_desc, [sample, kv_head, k_start + at, 0], v_full.index(slot), v_ring.index(slot))


@gluon.jit
def _load_short(v, v_row, v_ring, length, BLOCK_N: gl.constexpr, DIM: gl.constexpr, DIM_P2: gl.constexpr):
    """Values of a packed sequence that is shorter than a block, through masked pointers.

    TMA would read the next one's rows, and a NaN there times a weight of 0 is NaN. Keys need no such care: their
    products are replaced.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM_P2, DIM_P2 // 8], [4, 1], [1, 0])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))[:, None]
    d = gl.arange(0, DIM_P2, gl.SliceLayout(0, LAYOUT))[None, :]
    value = gl.load(v + n * v_row + d, mask=(n < length) & (d < DIM), other=0)  # [BN, D]
    v_ring.index(0).reshape([BLOCK_N, DIM_P2]).store(value)
    fence_async_shared()  # the tensor cores read through the asynchronous proxy


@gluon.jit
def _softmax(
    s, bias_row, own, shift, peak, scale_log2, HAS_BIAS: gl.constexpr, SCALE_FIRST: gl.constexpr, MASKED: gl.constexpr,
    SHIFTED: gl.constexpr,
):  # fmt: skip
    """One step of the running softmax as in `attention_parts._attend_block`: the new peak, by what the old one's sums
    shrink, and p = 2^(logit - peak), of products s [RM, BN]. SHIFTED: all keys have the bias `shift`."""
    if SCALE_FIRST:
        s = s * scale_log2
    if HAS_BIAS:
        s = s + bias_row[None, :]
    if MASKED:
        s = gl.where(own[None, :], s, float("-inf"))
    highest = gl.max(s, 1)  # [RM]
    if not SCALE_FIRST:
        highest = highest * scale_log2
        s = s * scale_log2
    if SHIFTED:
        highest = highest + shift
    new_peak = gl.maximum(peak, highest)
    base = new_peak
    if HAS_BIAS or MASKED:
        # While all keys so far are hidden, the peak is -inf, and -inf - -inf would be NaN.
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = gl.exp2(peak - base)  # [RM]
    if SHIFTED:
        base = base - shift
    return new_peak, shrink, gl.exp2(s - base[:, None])


@gluon.jit
def _step(
    i, query, zero, weights, bias_row, shift, peak, total, acc, memory, barriers, scale_log2,
    LOGITS: gl.constexpr, RESULT: gl.constexpr, WEIGHTS: gl.constexpr, SIDE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, DIM_P2: gl.constexpr, HAS_BIAS: gl.constexpr, SCALE_FIRST: gl.constexpr,
    SHIFTED: gl.constexpr,
):  # fmt: skip
    """Block i of a warpgroup: its turn i, in which it issues the products of block i with the queries and of block
    i - 1 with its weights. Then the other side may issue its own, while this one computes the softmax of block i."""
    q_tiles, k_ring, v_ring, bias_ring = memory
    q_full, k_full, k_empty, v_full, v_empty, turns = barriers
    slot = i % STAGES
    last = (i - 1) % STAGES
    mbarrier.wait(k_full.index(slot), _done(i // STAGES))
    if SIDE == 0:
        mbarrier.wait(turns.index(0), _done_before(i - 1))  # side 1 has had turn i - 1
    else:
        mbarrier.wait(turns.index(1), _done(i - 1))  # side 0 has had turn i
    key = k_ring.index(slot).reshape([BLOCK_N, DIM_P2]).permute((1, 0))
    s = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), _done((i - 1) // STAGES))
    acc = warpgroup_mma(weights, v_ring.index(last).reshape([BLOCK_N, DIM_P2]), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - SIDE), count=1)
    if HAS_BIAS:
        bias_row = bias_ring.index(slot).load(gl.SliceLayout(0, LOGITS))
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    peak, shrink, p = _softmax(s, bias_row, bias_row, shift, peak, scale_log2, HAS_BIAS, SCALE_FIRST, False, SHIFTED)
    total = total * shrink + gl.sum(p, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, RESULT))[:, None]
    return gl.convert_layout(p.to(q_tiles.dtype), WEIGHTS), peak, total, acc


@gluon.jit
def _attend_rows(
    memory, barriers, task, keys, order,
    SIDE: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
    DIM_P2: gl.constexpr, HAS_BIAS: gl.constexpr, SCALE_FIRST: gl.constexpr, HAS_LSE: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """A warpgroup, side 0 or 1 of the query block: its own rows over all keys."""
    q_tiles, k_ring, v_ring, bias_ring = memory
    q_full, k_full, k_empty, v_full, v_empty, turns = barriers
    scale_log2, out, lse, first, q_stop, out_row = task
    length, blocks, first_at, own_first, own_stop = keys
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_P2, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    query = q_tiles.index(SIDE).reshape([ROWS, DIM_P2])
    zero = gl.zeros((ROWS, BLOCK_N), gl.float32, LOGITS)
    acc = gl.zeros((ROWS, DIM_P2), gl.float32, RESULT)
    peak = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    bias_row = gl.zeros((BLOCK_N,), gl.float32, gl.SliceLayout(0, LOGITS))

    mbarrier.wait(q_full.index(0), _done(0))
    mbarrier.wait(k_full.index(0), _done(0))
    key = k_ring.index(0).reshape([BLOCK_N, DIM_P2]).permute((1, 0))
    s = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))  # [RM, BN]
    if HAS_BIAS:
        bias_row = bias_ring.index(0).load(gl.SliceLayout(0, LOGITS))
    mbarrier.arrive(k_empty.index(0), count=1)
    at = first_at + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LOGITS))
    own = (at >= own_first) & (at < own_stop)
    peak, shrink, p = _softmax(s, bias_row, own, 0.0, peak, scale_log2, HAS_BIAS, SCALE_FIRST, True, False)
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(q_tiles.dtype), WEIGHTS)

    begin = 1
    if ORDERED:
        key_order, tile_bias, shared_at, shared, others_at = order
        for i in range(1, shared + 1):
            shift = gl.load(tile_bias + (shared_at + i - 1))
            weights, peak, total, acc = _step(
                i, query, zero, weights, bias_row, shift, peak, total, acc, memory, barriers, scale_log2, LOGITS,
                RESULT, WEIGHTS, SIDE, BLOCK_N, STAGES, DIM_P2, False, False, True,
            )  # fmt: skip
        begin = shared + 1
    for i in range(begin, blocks):
        weights, peak, total, acc = _step(
            i, query, zero, weights, bias_row, 0.0, peak, total, acc, memory, barriers, scale_log2, LOGITS, RESULT,
            WEIGHTS, SIDE, BLOCK_N, STAGES, DIM_P2, HAS_BIAS, SCALE_FIRST, False,
        )  # fmt: skip

    last = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(last), _done((blocks - 1) // STAGES))
    acc = warpgroup_mma(weights, v_ring.index(last).reshape([BLOCK_N, DIM_P2]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    row = first + SIDE * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    if HAS_LSE:
        gl.store(lse + row, (peak + gl.log2(total)) / LOG2_E, mask=row < q_stop)
    total = gl.convert_layout(gl.where(total == 0, 1.0, total), gl.SliceLayout(1, RESULT))
    # Rows are stored in 16-byte vectors by way of the queries' tile, which no product reads any more.
    query.store((acc / total[:, None]).to(q_tiles.dtype))
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM_P2, DIM_P2 // 8], [4, 1], [1, 0])
    row = first + SIDE * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ROW))
    d = gl.arange(0, DIM_P2, gl.SliceLayout(0, ROW))
    to = out + row.to(gl.int64)[:, None] * out_row + d[None, :]
    gl.store(to, query.load(ROW), mask=(row < q_stop)[:, None] & (d < DIM)[None, :])


@gluon.jit(do_not_specialize=["tiles", "queries", "keys", "scale_log2", "bias_sample"],
           do_not_specialize_on_alignment=["bias", "lse", "cu_q", "cu_k", "plan", "key_order", "key_counts",
                                           "tile_bias"])  # fmt: skip
def attend_pingpong(
    q_desc, k_desc, v_desc, v, bias, out, lse, cu_q, cu_k, plan, tiles, heads, group, queries, keys, scale_log2,
    v_row, v_head, bias_sample, bias_key, key_order, key_counts, tile_bias,
    DIM: gl.constexpr, DIM_P2: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, PLANNED: gl.constexpr, HAS_BIAS: gl.constexpr, SCALE_FIRST: gl.constexpr,
    HAS_LSE: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale * q_i . k_j + bias_j),  lse_i = log sum_j p_ij

    One program computes one query block of one head over all keys of its sequence, as in `attention.attend`. Each side
    has half of its rows. Rings of STAGES slots hold blocks of keys and of values. A slot's `full` barrier completes a
    phase when its loads have landed, its `empty` one when both sides have read it.
    """
    ROWS: gl.constexpr = BLOCK_M // 2
    tile = gl.program_id(0) % tiles
    head = gl.program_id(0) // tiles
    sample = 0
    q_start, q_stop = 0, queries
    k_start, k_stop = 0, keys
    if PACKED:
        sequence = 0
        if PLANNED:
            sequence, head, tile = _work(gl.program_id(0), plan, cu_q, heads, queries, BLOCK_M)
        q_start, q_stop = _span(cu_q, gl.maximum(sequence, 0), queries)
        k_start, k_stop = _span(cu_k, gl.maximum(sequence, 0), keys)
        # Past the end of the plan there is nothing to do. No early return, which warps that wait for work would miss.
        q_stop = gl.where(sequence < 0, q_start, q_stop)
        k_stop = gl.where(sequence < 0, k_start, k_stop)
    else:
        sample = head // heads
        head = head % heads
    first = q_start + tile * BLOCK_M
    length = k_stop - k_start
    kv_head = head // group
    wide = gl.cast(sample, gl.int64)
    # The partial block is read first, so that the loop needs no mask. It is moved back until it ends with the sequence,
    # if that is long enough: TMA then reads none of the next one's rows. Keys of a later block are not its own.
    blocks = gl.maximum(gl.cdiv(length, BLOCK_N), 1)  # without keys, one block that is masked whole
    first_at, own_first, own_stop = gl.maximum(length - BLOCK_N, 0), (blocks - 1) * BLOCK_N, length
    order = (key_order, tile_bias, 0, 0, 0)
    if ORDERED:
        whole = length // BLOCK_N
        mine = sample
        if PACKED:
            mine = gl.maximum(sequence, 0)
        slot = (wide * keys + k_start) // BLOCK_N
        shared, others = _tile_counts(key_counts, mine, whole)
        # Without a partial block a listed one is read first, or none of its keys where all are hidden.
        taken = (length == whole * BLOCK_N) & (shared + others > 0)
        last = gl.load(key_order + gl.where(others > 0, slot + whole - 1, slot + shared - 1), mask=taken, other=0)
        last = gl.minimum(gl.maximum(last, 0), whole - 1) * BLOCK_N
        first_at = gl.where(taken, last, first_at)
        own_first = gl.where(taken, last, whole * BLOCK_N)
        own_stop = gl.where(taken, last + BLOCK_N, length)
        blocks = 1 + shared + others - gl.where(taken, 1, 0)
        order = (key_order, tile_bias, slot, shared - gl.where(taken & (others == 0), 1, 0), slot + whole - others)
    if HAS_BIAS:
        bias += wide * bias_sample + gl.cast(k_start, gl.int64) * bias_key
    if HAS_LSE:
        lse += (wide * heads + head) * queries
    out += (wide * queries * heads + head) * DIM

    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, DIM_P2], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, DIM_P2], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, DIM_P2], v_desc.layout)
    bias_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=2 if HAS_BIAS else 1)  # the keys, and their biases
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    for side in gl.static_range(2):
        mbarrier.init(turns.index(side), count=1)
    fence_async_shared()
    if PACKED and length < BLOCK_N:
        values = v + gl.cast(k_start, gl.int64) * v_row + gl.cast(kv_head, gl.int64) * v_head
        _load_short(values, v_row, v_ring, length, BLOCK_N, DIM, DIM_P2)

    memory = (q_tiles, k_ring, v_ring, bias_ring)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, turns)
    place = (sample, head, kv_head, first, k_start)
    task = (scale_log2, out, lse, first, q_stop, heads * DIM)
    span = (length, blocks, first_at, own_first, own_stop)
    gl.warp_specialize(
        [
            (_attend_rows, (memory, barriers, task, span, order, 0, ROWS, BLOCK_N, STAGES, DIM, DIM_P2, HAS_BIAS,
                            SCALE_FIRST, HAS_LSE, ORDERED)),
            (_attend_rows, (memory, barriers, task, span, order, 1, ROWS, BLOCK_N, STAGES, DIM, DIM_P2, HAS_BIAS,
                            SCALE_FIRST, HAS_LSE, ORDERED)),
            (_load_blocks, (q_desc, k_desc, v_desc, bias, bias_key, memory, barriers, place, span, order, ROWS,
                            BLOCK_N, STAGES, PACKED, HAS_BIAS, ORDERED)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: the two warpgroups share almost all that there are
    )  # fmt: skip

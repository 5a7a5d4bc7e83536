"""The order of work over packed sequences, which depends on their lengths alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .prepared import Launch


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


class Schedule:
    """Makes the plans that `plan_tiles` writes, (capacity, 2) int32, large enough for any lengths of these totals."""

    def __init__(self, sequences: int, queries: int, keys: int, longest: int | None, block_m: int) -> None:
        capacity = queries // block_m + sequences
        if longest is not None:
            capacity = min(capacity, sequences * launch.ceil_div(longest, block_m))
        self.capacity = capacity
        self._sizes = sequences, queries, keys, capacity, block_m, 128, 128
        self._launch = Launch(plan_tiles, (sequences + 1, 1, 1), num_warps=4)

    def __call__(self, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
        tiles = cu_q.new_empty((self.capacity, 2))
        if self.capacity:
            self._launch(cu_q, cu_k, tiles, *self._sizes)
        return tiles

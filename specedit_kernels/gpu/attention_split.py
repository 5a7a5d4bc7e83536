"""The last round of programs of a launch, where it leaves most processors idle, has its keys split among them.

Each part leaves its running softmax in memory, and a second kernel joins the parts of a query block. Only the blocks of
the short round are split, so what is written and read again stays small (compare Stream-K, arXiv 2301.03598).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention_parts import _store_rows
from .attention_plan import _span
from .prepared import Launch

MOST_PARTS = 8
LEAST_BLOCKS = 4  # of keys in a part: fewer do not fill the pipeline of loads
WORTH = 0.08  # share of a launch's time that a split must save, since the parts are joined in a launch of their own
LARGEST_DIM = 128  # of a head: with 256 the parts' bounds make a tile spill in Triton 3.6
JOINED_ROWS = 16  # that a program of `join_parts` joins


class Split(NamedTuple):
    """The programs from `start` on, `blocks` of them, are split in `parts`."""

    start: int
    blocks: int
    parts: int


def split_of(programs: int, slots: int, key_blocks: int) -> Split | None:
    """How to split the last round of `programs` of equal length on `slots`, or None where little would be saved.

    A round that is split in p parts takes 1/p of its time, if the processors have room for p times its programs.
    """
    if saved(programs, slots, key_blocks) < WORTH:
        return None
    last = programs % slots
    return Split(programs - last, last, _parts(last, slots, key_blocks))


def saved(programs: int, slots: int, key_blocks: int) -> float:
    """The share of a launch's time that splitting its last round saves, without what joining the parts costs."""
    if not (last := programs % slots):
        return 0.0
    return (1 - 1 / _parts(last, slots, key_blocks)) / launch.ceil_div(programs, slots)


def _parts(last: int, slots: int, key_blocks: int) -> int:
    return max(1, min(slots // last, key_blocks // LEAST_BLOCKS, MOST_PARTS))


@triton.jit
def _share(count, part, parts):
    """First and last-plus-one of `count` blocks that one of `parts` takes."""
    return count * part // parts, count * (part + 1) // parts


@triton.jit
def _store_part(sums, statistics, unit, peak, total, acc, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Keep a part's running softmax: sums (units, BM, D), statistics (units, 2, BM) with its maximum and total."""
    d, m = tl.arange(0, DIM_P2), tl.arange(0, BLOCK_M)
    unit = tl.cast(unit, tl.int64)
    tl.store(sums + (unit * BLOCK_M + m)[:, None] * DIM_P2 + d[None, :], acc)
    tl.store(statistics + 2 * unit * BLOCK_M + m, peak)
    tl.store(statistics + (2 * unit + 1) * BLOCK_M + m, total)


@triton.jit(do_not_specialize=["tiles", "heads", "queries", "split_from", "parts"],
            do_not_specialize_on_alignment=["cu_q"])  # fmt: skip
def join_parts(
    sums, statistics, out, lse, cu_q, tiles, heads, queries, split_from, parts,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """out_i = sum_p w_p acc_p / sum_p w_p total_p,  w_p = 2^(peak_p - max peak), for ROWS of a split query block."""
    chunks: tl.constexpr = BLOCK_M // ROWS
    block, row = tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS
    program = split_from + block
    tile, head = program % tiles, program // tiles
    sample = 0
    q_start, q_stop = 0, queries
    if PACKED:
        q_start, q_stop = _span(cu_q, 0, queries)
    else:
        sample = head // heads
        head = head % heads
    first = q_start + tile * BLOCK_M + row
    if first >= q_stop:
        return
    d, m = tl.arange(0, DIM_P2), row + tl.arange(0, ROWS)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM_P2), tl.float32)
    for part in range(0, parts):
        unit = tl.cast(block * parts + part, tl.int64)
        its_peak = tl.load(statistics + 2 * unit * BLOCK_M + m)
        its_total = tl.load(statistics + (2 * unit + 1) * BLOCK_M + m)
        its_acc = tl.load(sums + (unit * BLOCK_M + m)[:, None] * DIM_P2 + d[None, :])
        highest = tl.maximum(peak, its_peak)
        base = tl.where(highest == float("-inf"), 0.0, highest)  # all keys so far are hidden: -inf - -inf is NaN
        shrink, weight = tl.exp2(peak - base), tl.exp2(its_peak - base)
        total = total * shrink + its_total * weight
        acc = acc * shrink[:, None] + its_acc * weight[:, None]
        peak = highest
    _store_rows(out, lse, peak, total, acc, sample, head, first, q_stop, queries, heads, DIM, DIM_P2, ROWS, HAS_LSE)


class Left(NamedTuple):
    """The arguments of a split launch; by default those of one that is not split.

    Parts leave sums (units, BM, D) and statistics (units, 2, BM), float32. The programs from `start` on are split.
    """

    sums: torch.Tensor | None = None
    statistics: torch.Tensor | None = None
    start: int = 0
    parts: int = 1


class Parts:
    """What the parts of a split launch leave, and the launch that joins them."""

    def __init__(
        self, split: Split, tiles: int, heads: int, queries: int, dim: int, block_m: int, packed: bool, lse: bool
    ) -> None:
        dim_p2, rows = launch.next_power_of_2(dim), min(JOINED_ROWS, block_m)
        self._split, self._shape = split, (block_m, dim_p2)
        self._arguments = (tiles, heads, queries, split.start, split.parts, dim, dim_p2, block_m, rows, packed, lse)
        self._launch = Launch(join_parts, (split.blocks * (block_m // rows), 1, 1), num_warps=4)

    def empty(self, device: torch.device) -> Left:
        """The memory of one call."""
        (block_m, dim_p2), units = self._shape, self._split.blocks * self._split.parts
        shapes = (units, block_m, dim_p2), (units, 2, block_m)
        sums, statistics = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        return Left(sums, statistics, self._split.start, self._split.parts)

    def join(self, left: Left, out: torch.Tensor, lse: torch.Tensor | None, cu_q: torch.Tensor | None) -> None:
        """Write the output, and the lse where there is one."""
        self._launch(left.sums, left.statistics, out, lse, cu_q, *self._arguments)

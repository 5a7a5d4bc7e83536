"""The key blocks that a query block reads, when a list says so; a part of `attention.attend`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _kept_tiles(
    block_offsets, blocks, row, list_rows, listed, length, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr
):  # fmt: skip
    """The list of query block `row` in tiles of BLOCK_N keys: its first entry, BLOCK_N times its number of full tiles,
    and whether it keeps the sequence's last, partial tile.

    Entries ascend, so only the last one may be the partial block at the end of the sequence. Offsets are clamped, so
    wrong ones never address memory outside `blocks`.
    """
    PER_BLOCK: tl.constexpr = KEY_BLOCK // BLOCK_N
    known = row < list_rows
    first = tl.load(block_offsets + row, mask=known, other=0)
    stop = tl.load(block_offsets + row + 1, mask=known, other=0)
    first, stop = tl.minimum(tl.maximum(first, 0), listed), tl.minimum(tl.maximum(stop, 0), listed)
    entries = tl.maximum(stop - first, 0)
    last = tl.load(blocks + stop - 1, mask=entries > 0, other=0)
    in_last = tl.minimum(tl.maximum((length - last * KEY_BLOCK) // BLOCK_N, 0), PER_BLOCK)
    full = tl.maximum((entries - 1) * PER_BLOCK + in_last, 0)
    full = tl.where(length < BLOCK_N, 0, full)
    keeps_tail = (entries > 0) & (length % BLOCK_N > 0) & (last == (length - 1) // KEY_BLOCK)
    return first, full * BLOCK_N, keeps_tail


@triton.jit
def _tile_start(blocks, first, start, steps, whole, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """First key of the tile that a list reaches after `start` of its `steps` keys. A wrong entry gives another tile of
    the sequence, whose full tiles end at `whole`."""
    PER_BLOCK: tl.constexpr = KEY_BLOCK // BLOCK_N
    step = start // BLOCK_N
    tile = tl.load(blocks + first + step // PER_BLOCK, mask=start < steps, other=0) * PER_BLOCK + step % PER_BLOCK
    return tl.minimum(tl.maximum(tile, 0), whole // BLOCK_N - 1) * BLOCK_N


def tile_of(sizes: tuple[int, int], block_m: int, block_n: int) -> tuple[int, int]:
    """The largest tile up to (block_m, block_n), powers of two, that divides blocks of these sizes."""
    m, n = sizes
    return min(block_m, m & -m), min(block_n, n & -n)


class BlockLists(NamedTuple):
    """The lists of a launch: see `specedit_kernels.BlockKeep`."""

    block_offsets: torch.Tensor
    blocks: torch.Tensor
    query_block: int
    key_block: int

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, int, int, int, int]:
        """Offsets, blocks, rows, entries, and the strides of a sample's and a head's offsets, 0 where they share."""
        offsets, blocks = self.block_offsets.contiguous(), self.blocks.contiguous()
        heads = offsets.shape[-2] if offsets.dim() > 1 else 1
        samples = offsets.shape[-3] if offsets.dim() > 2 else 1
        ends = offsets.shape[-1]
        strides = heads * ends if samples > 1 else 0, ends if heads > 1 else 0
        return offsets, blocks, ends - 1, blocks.shape[0], *strides

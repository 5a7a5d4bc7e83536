"""Lists of the key blocks that each query block reads, and their checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checks

BLOCK_UNIT = 64  # every shipped tile is a power of two, and those above 64 are shortened to it where needed


@dataclass(frozen=True, eq=False)
class BlockKeep:
    """For every block of queries, the blocks of keys that it reads: the `block_keep` of `mixed_attention`.

    Blocks count from the start of their sequence, whose last one may be shorter. Query block i reads the key blocks
    `blocks[offsets[..., i]:offsets[..., i + 1]]`. If there are none, its queries give 0, and -inf as their lse.

    Args:
        offsets: int32 (..., R + 1) for R query blocks. They never decrease along the last axis and stay within
            `blocks`. The axes before are () for lists that all samples and heads share, (B or 1, H or 1) for dense
            queries, and (H or 1,) for packed ones; H counts query heads. In a packed batch, the query blocks of all
            sequences follow each other.
        blocks: int32 (L,), on the same device. Within a row the numbers increase. What no row covers is not read.
        query_block, key_block: tokens of a block, multiples of 64. On CUDA a tile is no longer than a block, so 128 may
            be faster than 64.
        key_blocks: number of key blocks of a dense sequence, if it is to be compared with the keys.

    Raises:
        TypeError: not a tensor, not int32, or block sizes that are not integers.
        ValueError: shapes or devices that do not fit, block sizes that are not multiples of 64, offsets that decrease
            or leave `blocks`, numbers that are negative or do not increase. On CUDA, values are read only with
            SPECEDIT_KERNELS_DEBUG=1, because reading makes the host wait; the kernel stays within its tensors for any.
    """

    offsets: torch.Tensor
    blocks: torch.Tensor
    query_block: int = 128
    key_block: int = 128
    key_blocks: int | None = None

    def __post_init__(self) -> None:
        checks.expect_tensor("offsets", self.offsets, dtypes=(torch.int32,), dims=(1, 2, 3))
        checks.expect_tensor("blocks", self.blocks, dtypes=(torch.int32,), dims=(1,), device=self.offsets.device)
        for name, size in (("query_block", self.query_block), ("key_block", self.key_block)):
            _expect_block_size(name, size)
        if self.offsets.shape[-1] == 0:
            raise ValueError(f"offsets: expected at least 1 entry per list, got shape {tuple(self.offsets.shape)}")
        if not torch.compiler.is_compiling():  # a compiled call is checked below the compiler
            check_lists(self.offsets, self.blocks)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, *, query_block: int = 128, key_block: int = 128) -> BlockKeep:
        """The lists of a mask of blocks. Runs on the mask's device, does not wait for it, and can be compiled.

        Args:
            mask: boolean (..., R, K), True where query block r reads key block k. The axes before are those of
                `offsets`: none, (B or 1, H or 1) for dense, (H or 1,) for packed queries. In a packed batch the rows of
                all sequences follow each other, and columns count from the start of the row's sequence.
            query_block, key_block: tokens of a block, multiples of 64.

        Raises:
            TypeError: not a boolean tensor.
            ValueError: not 2 to 4 dimensions, or 2^31 and more blocks.
        """
        checks.expect_tensor("mask", mask, dtypes=(torch.bool,), dims=(2, 3, 4))
        if mask.numel() >= 2**31:
            raise ValueError(f"mask: expected fewer than 2^31 blocks, got shape {tuple(mask.shape)}")
        kept = mask.reshape(-1)
        ahead = kept.cumsum(0, dtype=torch.int32)  # kept blocks up to and with each
        counts = mask.sum(-1, dtype=torch.int32)
        stops = counts.reshape(-1).cumsum(0, dtype=torch.int32).view(counts.shape)
        first = (stops - counts)[..., :1] if mask.shape[-2] else stops.new_zeros((*counts.shape[:-1], 1))
        # Kept blocks first, the others behind them: every place is written once, and no length depends on a value.
        number = torch.arange(kept.shape[0], device=mask.device)
        place = torch.where(kept, ahead - 1, counts.sum() + number - ahead)
        columns = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32).expand(mask.shape).reshape(-1)
        blocks = torch.empty_like(columns).scatter(0, place.long(), columns)
        return cls(torch.cat([first, stops], dim=-1), blocks, query_block, key_block, mask.shape[-1])

    @classmethod
    def from_masks(cls, masks: Sequence[torch.Tensor], *, query_block: int = 128, key_block: int = 128) -> BlockKeep:
        """The lists of a packed batch: one mask (R, K), or one per head (H, R, K), for each of its sequences.

        Raises:
            TypeError, ValueError: as `from_mask`; no masks, or masks whose heads differ.
        """
        if not masks:
            raise ValueError("masks: expected at least one, got none")
        for i, mask in enumerate(masks):
            checks.expect_tensor(f"masks[{i}]", mask, dtypes=(torch.bool,), dims=(2, 3), device=masks[0].device)
            checks.expect_shape(f"masks[{i}]", mask, (*masks[0].shape[:-2], *mask.shape[-2:]))
        widest = max(mask.shape[-1] for mask in masks)
        padded = [torch.nn.functional.pad(mask, (0, widest - mask.shape[-1])) for mask in masks]
        return cls.from_mask(torch.cat(padded, dim=-2), query_block=query_block, key_block=key_block)


def _expect_block_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size <= 0 or size % BLOCK_UNIT:
        raise ValueError(f"{name}: expected a positive multiple of {BLOCK_UNIT}, got {size}")


def _first(wrong: torch.Tensor) -> int:
    return int(wrong.reshape(-1).to(torch.uint8).argmax())


def check_lists(offsets: torch.Tensor, blocks: torch.Tensor) -> None:
    """Raise ValueError unless offsets never decrease and stay within `blocks`, whose rows increase from 0 or more.

    On a GPU nothing is read, except in debug mode.
    """
    if offsets.numel() == 0 or not checks.values_are_checked(offsets):
        return
    low, high = (int(value) for value in offsets.aminmax())
    if low < 0 or high > blocks.shape[0]:
        raise ValueError(f"offsets: expected values in [0, {blocks.shape[0]}], got values from {low} to {high}")
    starts, stops = offsets[..., :-1].long(), offsets[..., 1:].long()
    if bool((wrong := stops < starts).any()):
        at = _first(wrong)
        pair = int(starts.reshape(-1)[at]), int(stops.reshape(-1)[at])
        raise ValueError(f"offsets: expected values that never decrease, got {pair[0]} then {pair[1]}")
    if blocks.shape[0] == 0:
        return
    # Falls up to each entry, so that the falls within a row are a difference.
    falls = torch.nn.functional.pad((blocks[1:] <= blocks[:-1]).cumsum(0), (1, 0))
    listed = stops > starts
    firsts, lasts = starts[listed], stops[listed] - 1
    if bool((wrong := falls[lasts] > falls[firsts]).any()):
        at = _first(wrong)
        row = blocks[int(firsts[at]) : int(lasts[at]) + 1].tolist()
        raise ValueError(f"blocks: expected numbers that increase within a row, got {row}")
    if bool((wrong := blocks[firsts] < 0).any()):
        raise ValueError(f"blocks: expected numbers of at least 0, got {int(blocks[firsts][_first(wrong)])}")


def check_fits(keep: Any, q: torch.Tensor, k: torch.Tensor, packed: bool) -> None:
    """Raise unless `keep` is a BlockKeep on the device of `q` with lists for its batch, heads and query blocks."""
    if not isinstance(keep, BlockKeep):
        raise TypeError(f"block_keep: expected a BlockKeep, got {type(keep).__name__}")
    if keep.offsets.device != q.device:
        raise ValueError(f"block_keep: expected device {q.device}, got {keep.offsets.device}")
    shape, heads = tuple(keep.offsets.shape), q.shape[-2]
    allowed: tuple[tuple[int, ...], ...] = ((1, heads),) if packed else ((1, q.shape[0]), (1, heads))
    own = shape[:-1]
    if own and (len(own) != len(allowed) or any(n not in sizes for n, sizes in zip(own, allowed))):
        wanted = f"({heads} or 1," if packed else f"({q.shape[0]} or 1, {heads} or 1,"
        raise ValueError(f"block_keep: expected offsets of shape (R + 1,) or {wanted} R + 1), got {shape}")
    if packed:  # the rows of each sequence depend on values
        return
    _expect_blocks("query", shape[-1] - 1, q.shape[1], keep.query_block)
    if keep.key_blocks is not None:
        _expect_blocks("key", keep.key_blocks, k.shape[1], keep.key_block)


def names_all_keys(keep: BlockKeep, k: Any) -> bool:
    """Whether lists for the keys k of a dense call, (B, N_k, H, D), know as many blocks as these have.

    The number of blocks is no argument of the operator, so a remembered call must look at it anew.
    """
    if keep.key_blocks is None or not isinstance(k, torch.Tensor) or k.dim() != 4:
        return True
    return keep.key_blocks == -(-k.shape[1] // keep.key_block)


def _expect_blocks(name: str, got: int, tokens: int, size: int) -> None:
    wanted = -(-tokens // size)
    if got != wanted:
        tokens_, noun = ("queries", "query") if name == "query" else ("keys", "key")
        raise ValueError(f"block_keep: expected {wanted} {noun} blocks of {size} for {tokens} {tokens_}, got {got}")


def check_values(args: tuple[Any, ...], *, read: bool) -> None:
    """Raise ValueError unless the lists among the arguments of the operator fit its sequences.

    With `read` they are looked at wherever they are.
    """
    q, k, _, cu_q, cu_k, _, _, _, _, offsets, blocks, query_block, key_block = args
    if not read and not checks.values_are_checked(offsets):
        return
    check_lists(offsets, blocks)
    q_ends = [0, q.shape[-3]] if cu_q is None else cu_q.tolist()
    k_ends = [0, k.shape[-3]] if cu_k is None else cu_k.tolist()
    rows = [-(-(b - a) // query_block) for a, b in itertools.pairwise(q_ends)]
    limits = [-(-(b - a) // key_block) for a, b in itertools.pairwise(k_ends)]
    if sum(rows) != offsets.shape[-1] - 1:
        raise ValueError(
            f"block_keep: expected {sum(rows)} query blocks of {query_block} for these sequences, got "
            f"{offsets.shape[-1] - 1}"
        )
    if offsets.numel() == 0 or blocks.shape[0] == 0:
        return
    limit = torch.tensor([n for n, count in zip(limits, rows) for _ in range(count)], device=offsets.device)
    starts, stops = offsets[..., :-1].long(), offsets[..., 1:].long()
    last = torch.where(stops > starts, blocks[(stops - 1).clamp_min(0)], -1)
    if bool((wrong := last >= limit).any()):
        at = _first(wrong)
        highest = int(limit.expand(last.shape).reshape(-1)[at])
        raise ValueError(
            f"block_keep: expected key blocks in [0, {highest}) of {key_block} keys, got {int(last.reshape(-1)[at])}"
        )

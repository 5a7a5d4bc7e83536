"""Where a reference picture lies on the output's grid: pure data.

An editing model copies by position, so a reference whose grid differs from the output's is cropped or padded there,
never stretched. An adapter says where its model puts a reference's first token (`reference_offset`); everything else,
the positions that the transformer gets included, follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import LayoutSet, MixedLayout, TokenGrid, cells_touched


@dataclass(frozen=True)
class Placement:
    """The first token of `reference` lies at (`row`, `col`) of `output`, in tokens; it may lie outside."""

    output: TokenGrid
    reference: TokenGrid
    row: float = 0
    col: float = 0

    @property
    def is_same(self) -> bool:
        """Whether both grids are one: nothing is cropped and nothing padded."""
        return self.output == self.reference and self.row == self.col == 0

    @property
    def inverse(self) -> Placement:
        """Where the output lies on the reference's grid."""
        return Placement(self.reference, self.output, -self.row, -self.col)

    def at_scale(self, scale: int) -> Placement:
        """The same place on grids of `scale` times less a side, where it may be a fraction of a token."""
        return Placement(self.output.coarse(scale), self.reference.coarse(scale), self.row / scale, self.col / scale)

    @cached_property
    def covered(self) -> Tensor:
        """(h, w) bool: the output's tokens on which the reference lies."""
        (_, rows), (_, columns) = self._axes()
        return rows[:, None] & columns

    @property
    def covers(self) -> bool:
        """Whether the reference lies on all of the output."""
        return bool(self.covered.all())

    @property
    def shown(self) -> tuple[slice, slice]:
        """Rows and columns of the reference's tokens that the output shows."""
        lengths = zip(self.output.shape, self.reference.shape, (self.row, self.col), strict=True)
        rows, columns = (slice(max(0, -int(at)), min(n, m - int(at))) for m, n, at in lengths)
        return rows, columns

    def place(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, C) of the reference on the output's grid (B, N, C). Beyond the reference its border repeats."""
        if self.is_same:
            return tokens
        image = tokens.unflatten(1, self.reference.shape)
        return self._gather(image.movedim(-1, 1)).movedim(1, -1).flatten(1, 2)

    def place_pixels(self, pixels: Tensor, side: int) -> Tensor:
        """Pictures (B, c, h, w) of `side` px a token, the same way."""
        return pixels if self.is_same else self._gather(pixels, side)

    def place_mask(self, mask: Tensor) -> Tensor:
        """(B, h, w) bool of the reference's tokens on the output's grid. Beyond the reference nothing is set."""
        return mask if self.is_same else self._gather(mask) & self.covered.to(mask.device)

    def layout(self, target: MixedLayout) -> MixedLayout:
        """The reference's layout beside the target's.

        All coarse or all fine beside such a target. In a mixed sequence a cell is split where any of its tokens lies in
        a split cell of the output; what lies beyond the output stays coarse.
        """
        if self.is_same:
            return target
        if target.is_fine or target.is_coarse:
            expanded = torch.full(self.reference.coarse().shape, target.is_fine, device=target.expanded.device)
        else:
            tokens = target.expanded.repeat_interleave(2, 0).repeat_interleave(2, 1)
            tokens = self.inverse.place_mask(tokens[None, : self.output.height, : self.output.width])
            expanded = cells_touched(tokens.float(), self.reference)[0]
        return MixedLayout(self.reference, expanded, (self.row, self.col), target.unit)

    def _axes(self, side: int = 1) -> list[tuple[Tensor, Tensor]]:
        """For rows and columns: which of the reference lies at each of the output, and whether one does."""
        axes = []
        for length, other, at in zip(self.output.shape, self.reference.shape, (self.row, self.col), strict=True):
            index = torch.arange(length * side) - round(at * side)
            axes.append((index.clamp(0, other * side - 1), (index >= 0) & (index < other * side)))
        return axes

    def _gather(self, image: Tensor, side: int = 1) -> Tensor:
        """(..., h, w) of the reference at the output's places."""
        (rows, _), (columns, _) = self._axes(side)
        return image.index_select(-2, rows.to(image.device)).index_select(-1, columns.to(image.device))


def layouts_beside(target: MixedLayout, placements: tuple[Placement, ...]) -> MixedLayout | LayoutSet:
    """The layout of one reference, or of several, beside the target's."""
    each = tuple(placement.layout(target) for placement in placements)
    return each[0] if len(each) == 1 else LayoutSet(each)


def picture_cells(mask: Tensor, placement: Placement) -> Tensor:
    """(B, cells_h, cells_w) bool: the output's cells that overlap a nonzero sample of a mask (B, H, W) of the picture,
    whatever its resolution."""
    if placement.is_same:
        return cells_touched(mask, placement.output)
    tokens = F.adaptive_max_pool2d(mask[:, None], placement.reference.shape)[:, 0] > 0
    return cells_touched(placement.place_mask(tokens).float(), placement.output)

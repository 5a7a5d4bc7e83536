"""Where a reference picture lies on the output's grid: pure data.

Editing models copy by position, so a reference with another grid is cropped or padded, never stretched. An adapter says
where its model puts a reference's first token (`reference_offset`). Everything else follows, the transformer's
positions included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import LayoutSet, MixedLayout, TokenGrid, cells_touched


@dataclass(frozen=True)
class Placement:
    """The first token of `reference` lies at (`row`, `col`) of `output`, in tokens; it may lie outside.

    Raises:
        ValueError: the tokens of the two grids hold different patches.
    """

    output: TokenGrid
    reference: TokenGrid
    row: int = 0
    col: int = 0

    def __post_init__(self) -> None:
        if self.output.geometry != self.reference.geometry:
            raise ValueError(
                f"reference: expected tokens of the output's geometry, patch={self.output.geometry.patch}, "
                f"got patch={self.reference.geometry.patch}"
            )

    @property
    def is_same(self) -> bool:
        """Whether the grids coincide: nothing is cropped or padded."""
        return self.output == self.reference and self.row == self.col == 0

    @property
    def inverse(self) -> Placement:
        """Where the output lies on the reference's grid."""
        return Placement(self.reference, self.output, -self.row, -self.col)

    def lead(self, scale: int = 2) -> tuple[int, int]:
        """Rows and columns of the output's cell that precede the reference's first token."""
        return self.row % scale, self.col % scale

    def cells(self, scale: int = 2) -> Placement:
        """The placement in the output's cells of `scale` tokens a side; the reference may cover some in part.

        Not the model's own centring of small images, which would be off by up to a cell.
        """
        (top, left), grid = self.lead(scale), self.reference
        reference = grid.extended(top, left).coarse(scale)
        return Placement(self.output.coarse(scale), reference, (self.row - top) // scale, (self.col - left) // scale)

    def with_lead(self, tokens: Tensor, scale: int = 2) -> tuple[Tensor, TokenGrid]:
        """Tokens (B, n, C) of the reference after a `lead` that repeats the border, and the grid of both."""
        (top, left), grid = self.lead(scale), self.reference
        padded = Placement(grid.extended(top, left), grid, top, left)
        return padded.place(tokens), padded.output

    @cached_property
    def covered(self) -> Tensor:
        """(h, w) bool: the output's tokens that the reference covers."""
        (_, rows), (_, columns) = self._axes()
        return rows[:, None] & columns

    @property
    def covers(self) -> bool:
        """Whether the reference covers the whole output."""
        return bool(self.covered.all())

    @property
    def shown(self) -> tuple[slice, slice]:
        """Rows and columns of the reference's tokens that the output shows."""
        lengths = zip(self.output.shape, self.reference.shape, (self.row, self.col), strict=True)
        rows, columns = (slice(max(0, -at), min(n, m - at)) for m, n, at in lengths)
        return rows, columns

    def place(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, C) of the reference on the output's grid (B, N, C). Its border is repeated beyond it."""
        if self.is_same:
            return tokens
        image = tokens.unflatten(1, self.reference.shape)
        return self._gather(image.movedim(-1, 1)).movedim(1, -1).flatten(1, 2)

    def place_pixels(self, pixels: Tensor, side: int) -> Tensor:
        """`place` for pictures (B, c, h, w) of `side` px per token."""
        return pixels if self.is_same else self._gather(pixels, side)

    def place_mask(self, mask: Tensor) -> Tensor:
        """(B, h, w) bool of the reference's tokens on the output's grid. False beyond the reference."""
        return mask if self.is_same else self._gather(mask) & self.covered.to(mask.device)

    def layout(self, target: MixedLayout) -> MixedLayout:
        """The reference's layout for a target's.

        A cell of the reference is its part within a cell of the output, and is split if that cell is. Beyond the
        output, cells stay coarse in a mixed sequence.
        """
        if self.is_same:
            return target
        cells, (top, left) = self.cells(), self.lead()
        if target.is_fine:
            expanded = torch.ones(cells.reference.shape, dtype=torch.bool, device=target.expanded.device)
        else:
            expanded = cells.inverse.place_mask(target.expanded[None])[0]
        grid = self.reference.extended(top, left)
        return MixedLayout(grid, expanded, (top, left), (self.row - top, self.col - left), target.unit)

    def _axes(self, side: int = 1) -> list[tuple[Tensor, Tensor]]:
        """For rows and columns: the reference's index at each of the output's, and whether it is inside."""
        axes = []
        for length, other, at in zip(self.output.shape, self.reference.shape, (self.row, self.col), strict=True):
            index = torch.arange(length * side) - at * side
            axes.append((index.clamp(0, other * side - 1), (index >= 0) & (index < other * side)))
        return axes

    def _gather(self, image: Tensor, side: int = 1) -> Tensor:
        """(..., h, w) of the reference at the output's positions."""
        (rows, _), (columns, _) = self._axes(side)
        return image.index_select(-2, rows.to(image.device)).index_select(-1, columns.to(image.device))


def layouts_beside(target: MixedLayout, placements: tuple[Placement, ...]) -> MixedLayout | LayoutSet:
    """The layout of one reference, or of several, for a target's."""
    each = tuple(placement.layout(target) for placement in placements)
    return each[0] if len(each) == 1 else LayoutSet(each)


def picture_cells(mask: Tensor, placement: Placement) -> Tensor:
    """(B, cells_h, cells_w) bool: output cells that overlap a nonzero sample of the picture's mask (B, H, W), at any
    resolution."""
    if placement.is_same:
        return cells_touched(mask, placement.output)
    tokens = F.adaptive_max_pool2d(mask[:, None], placement.reference.shape)[:, 0] > 0
    return cells_touched(placement.place_mask(tokens).float(), placement.output)

"""Positions of target tokens of any size: rotary frequencies that the model's tables do not list.

The references stay at full resolution beside every target, so all of its tokens lie where what they cover lies on the
output's grid: a cell of 2 x 2 tokens at its centre, between them, and a draft's token at the centre of its cell. The
model counts rows and columns from the middle of each picture; the frame is the place in the text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...layout import MixedLayout, TokenGrid
from ..shared.position_hook import PositionHook


class Placed(list):
    """One sample's `img_shapes`, a target of so many tokens, and the frequencies that `pos_embed` returns for it."""

    def __init__(self, tokens: int, frequencies: Tensor):
        super().__init__([(1, 1, tokens)])
        self.frequencies = frequencies

    def to(self, device: Any, non_blocking: bool = False) -> Placed:
        """A copy on `device`, for offloading hooks."""
        moved = copy.copy(self)
        moved.frequencies = self.frequencies.to(device, non_blocking=non_blocking)
        return moved


class PlacedHook(PositionHook):
    """The frequencies that a call brings with it; the model's own tables in any other call."""

    def __call__(self, img_shapes: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(img_shapes, Placed):
            return img_shapes.frequencies
        frequencies: Tensor = self.stock(img_shapes, *args, **kwargs)
        return frequencies


def reference_offset(output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
    """Row and column of the output's grid at which a reference's first token lies: both are centred."""
    row, col = ((n - n // 2) - (m - m // 2) for n, m in zip(output.shape, reference.shape, strict=True))
    return row, col


def spans(layout: MixedLayout, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """(N, 2) float32 rows and columns of the output's grid: the centre of each token, and the (N,) tokens it covers.

    layout: of a target on the output's grid, or on a smaller one whose tokens are cells of it.
    """
    positions, scale = layout.positions, scale_of(layout.grid, grid)
    if layout.unit == 2:  # whole numbers of cells
        first = 2 * positions
        last = first + (layout.area > 1)[:, None].to(first)
        positions = (first + torch.minimum(last, _last(layout.grid, first))) / 2
    if scale == 1:
        return positions, layout.area
    first = scale * positions.floor()  # a cell's centre lies between its tokens
    last = torch.minimum(scale * positions.ceil() + scale - 1, _last(grid, first))
    return (first + last) / 2, (last - first + 1).prod(-1)


def _last(grid: TokenGrid, like: Tensor) -> Tensor:
    """The last row and column."""
    return torch.stack([torch.full_like(like[0, 0], side - 1) for side in grid.shape])


def scale_of(small: TokenGrid, grid: TokenGrid) -> int:
    """How many tokens a side of `grid` one of `small` covers; ValueError where none fit."""
    scale = 1
    while scale <= max(grid.shape):
        if grid.coarse(scale).shape == small.shape:
            return scale
        scale *= 2
    raise ValueError(f"layout: expected the grid {grid.shape} or its cells, got {small.shape}")


def frequencies(pos_embed: nn.Module, frame: int, positions: Tensor, grid: TokenGrid) -> Tensor:
    """(N, D/2) complex64 exp(i * angle); at whole positions the bits of the model's tables.

    frame: the target's. positions: rows and columns (N, 2) of the output's grid.
    """
    axes = [torch.full_like(positions[:, 0], frame)]
    axes += [positions[:, axis] - (side - side // 2) for axis, side in enumerate(grid.shape)]
    parts = []
    for place, dim in zip(axes, pos_embed.axes_dim, strict=True):
        rates = torch.arange(0, dim, 2, device=positions.device).to(torch.float32).div(dim)
        parts.append(torch.outer(place, 1.0 / torch.pow(pos_embed.theta, rates)))
    angle = torch.cat(parts, 1)
    return torch.polar(torch.ones_like(angle), angle)

"""Positions of Qwen-Image: rotary frequencies of any token, not only of those in the model's tables.

`QwenEmbedRope` reads whole rows and columns, counted from the middle of each image, out of two tables. Tokens of a
mixed sequence lie between them, so their frequencies are computed here, by the same formula and to the same bits, and
travel inside the `img_shapes` argument. The hook on `transformer.pos_embed` hands them back; any other call goes to the
model's own tables, which stay as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...layout import LayoutSet, MixedLayout, TokenGrid
from ..shared.position_hook import PositionHook


class ImgShapesWithFreqs(list):
    """The `img_shapes` of a call, [[(1, target tokens, 1), (1, reference tokens, 1)]] for each sample of its batch, and
    the frequencies that `pos_embed` returns for it."""

    def __init__(self, target: int, reference: int, batch: int, frequencies: tuple[Tensor, Tensor]):
        super().__init__([[(1, target, 1), (1, reference, 1)]] * batch)
        self.frequencies = frequencies

    def to(self, device: Any, non_blocking: bool = False) -> ImgShapesWithFreqs:
        """A copy on `device`. Offloading hooks ask for it; of a plain list they would make a new one, item by item."""
        moved = copy.copy(self)
        moved.frequencies = tuple(table.to(device, non_blocking=non_blocking) for table in self.frequencies)
        return moved


class FrequenciesHook(PositionHook):
    """The frequencies that a call brings with it; the model's own tables in any other call."""

    def __call__(self, video_fhw: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if isinstance(video_fhw, ImgShapesWithFreqs):
            return video_fhw.frequencies
        return self.stock(video_fhw, *args, **kwargs)


def reference_offset(output: TokenGrid, reference: TokenGrid, scale_rope: bool) -> tuple[int, int]:
    """Row and column of the output's grid at which a reference's first token lies: both are centred, or both count from
    the first token."""
    if not scale_rope:
        return 0, 0
    row, col = ((n - n // 2) - (m - m // 2) for n, m in zip(output.shape, reference.shape, strict=True))
    return row, col


def image_positions(layout: MixedLayout, frame: int, scale_rope: bool, within: MixedLayout | None = None) -> Tensor:
    """(N, 3) float32 frame, row and column of a layout's tokens, counted from the middle of the image (scale_rope).

    Row i of h has position i - (h - h // 2), as in the model's tables. A layout that is all coarse is a small image.
    within: the output's layout, on whose grid a reference lies; None: of the output itself.
    """
    positions = layout.positions
    if scale_rope:
        centre = [side - side // 2 for side in _position_grid(within or layout).shape]
        positions = positions - torch.tensor(centre, dtype=positions.dtype, device=positions.device)
    return torch.cat([torch.full_like(positions[:, :1], frame), positions], 1)


def all_positions(layout: MixedLayout, reference: MixedLayout | LayoutSet, scale_rope: bool) -> tuple[Tensor, Tensor]:
    """Positions of the target's tokens (frame 0), and of every reference's (frames 1, 2, ...)."""
    others = [image_positions(part, 1 + i, scale_rope, layout) for i, part in enumerate(reference.layouts)]
    return image_positions(layout, 0, scale_rope), torch.cat(others)


def text_offset(layout: MixedLayout, reference: MixedLayout | LayoutSet, scale_rope: bool) -> int:
    """Where the text begins on all three axes: beyond the largest position of any image.

    Around images that are all coarse it stands as close as around small ones. Left where the full ones have it, it
    would stand where no image of that size has it.
    """
    sides = [side for part in (layout, *reference.layouts) for side in _position_grid(part).shape]
    return max(side // 2 if scale_rope else side for side in sides)


def _position_grid(layout: MixedLayout) -> TokenGrid:
    """The grid that a layout's positions lie in."""
    return layout.picture.coarse() if layout.unit == 2 else layout.picture


def angles(pos_embed: nn.Module, positions: Tensor) -> Tensor:
    """(N, D/2) float32 rotary angles of positions (N, 3): position / theta^(2i/d) on each axis of d dimensions."""
    parts = []
    for axis, dim in enumerate(pos_embed.axes_dim):
        rates = torch.arange(0, dim, 2, device=positions.device).to(torch.float32).div(dim)
        parts.append(torch.outer(positions[:, axis], 1.0 / torch.pow(pos_embed.theta, rates)))
    return torch.cat(parts, 1)


def phases(angle: Tensor) -> Tensor:
    """exp(i * angle), complex64, as the stock processors take them."""
    return torch.polar(torch.ones_like(angle), angle)

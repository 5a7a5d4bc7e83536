"""Decodes only boxes around the edited cells, with Qwen's autoencoder, whose norms see one pixel each.

The decoder's attention lies in its middle block. That and the first up block, which are cheap, see the whole picture.
The convolutions after them reach a few latents far, so a box with as much halo decodes to the whole picture's pixels,
to within rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from .single_frame_vae import is_compiled

LARGEST = 0.5  # share of the picture in boxes, halos included, from which the whole is decoded instead


class Box(NamedTuple):
    """Rows and columns of a grid."""

    top: int
    bottom: int
    left: int
    right: int

    def times(self, scale: int) -> Box:
        return Box(*(edge * scale for edge in self))

    def grown(self, by: int, height: int, width: int) -> Box:
        """With a margin, inside a grid of this size."""
        return Box(
            max(self.top - by, 0), min(self.bottom + by, height), max(self.left - by, 0), min(self.right + by, width)
        )

    def within(self, outer: Box) -> Box:
        """The same place, counted from the outer box's corner."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def of(self, x: Tensor) -> Tensor:
        """A view of x (..., h, w)."""
        return x[..., self.top : self.bottom, self.left : self.right]

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def boxes_around(cells: Tensor, gap: int) -> list[Box]:
    """Boxes that hold every true cell of (h, w), cut apart along `gap` or more empty rows or columns."""
    return _split(cells.cpu(), Box(0, cells.shape[0], 0, cells.shape[1]), gap)


def _split(cells: Tensor, box: Box, gap: int) -> list[Box]:
    rows = box.top + box.of(cells).any(1).nonzero()[:, 0]
    columns = box.left + box.of(cells).any(0).nonzero()[:, 0]
    if not len(rows):
        return []
    box = Box(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    for used, before, after in ((rows, "bottom", "top"), (columns, "right", "left")):
        empty = used.diff() - 1
        if (empty >= gap).any():
            i = int(empty.argmax())
            halves = box._replace(**{before: int(used[i]) + 1}), box._replace(**{after: int(used[i + 1])})
            return [one for half in halves for one in _split(cells, half, gap)]
    return [box]


def why_whole(vae: Any) -> str | None:
    """Why this autoencoder decodes whole pictures only, or None."""
    if not isinstance(vae, AutoencoderKLQwenImage):
        return f"{type(vae).__name__} is not AutoencoderKLQwenImage"
    if vae.use_tiling:
        return "it decodes in tiles"
    if is_compiled(vae):
        return "it is compiled"
    if not isinstance(getattr(vae, "_hf_hook", None), (CpuOffload, type(None))):
        return "its layers are offloaded one by one"
    if any(hasattr(module, "_diffusers_hook") for module in vae.modules()):
        return "its layers are offloaded in groups"
    return None


def halo(vae: Any) -> int:
    """Latents that the convolutions after the first up block reach; those of the i-th reach 2**-i latents each.

    An up block has two convolutions a residual block, and one after upsampling for the next. The head has one.
    """
    last, convolutions = len(vae.decoder.up_blocks) - 1, 2 * (vae.config.num_res_blocks + 1)
    return math.ceil(sum((convolutions + (i > 1)) / 2**i for i in range(1, last + 1)) + 1 / 2**last)


def plan(vae: Any, cells: Tensor, cell: int, height: int, width: int) -> tuple[list[list[Box]], float]:
    """Boxes in latents for every sample, and the share of the pictures that they and their halos make up.

    cells (B, h, w) bool, each `cell` latents a side; height, width: of the latents.
    """
    margin = halo(vae)
    gap = math.ceil(2 * margin / cell)
    boxes = [[box.times(cell).grown(0, height, width) for box in boxes_around(one, gap)] for one in cells]
    area = sum(box.grown(margin, height, width).area for sample in boxes for box in sample)
    return boxes, area / (height * width * len(cells))


def decode(vae: Any, latents: Tensor, boxes: list[list[Box]]) -> Tensor:
    """Latents (B, C, 1, h, w) as `vae.decode` takes them to pictures (B, 3, 8 h, 8 w), 0 outside the boxes."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)  # as before `vae.decode`: takes the transformer's place on the device
    height, width = latents.shape[-2:]
    scale = 2 ** (len(vae.decoder.up_blocks) - 1)
    out = latents.new_zeros(len(latents), vae.config.get("input_channels", 3), height * scale, width * scale)
    for picture, sample, inside in zip(out, latents.split(1), boxes, strict=True):
        seen = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(sample)))
        seen = vae.decoder.up_blocks[0](seen)
        for box in inside:
            outer = box.grown(halo(vae), height, width)
            decoded = _late_stages(vae.decoder, outer.times(2).of(seen))[0, :, 0]
            box.times(scale).of(picture).copy_(box.within(outer).times(scale).of(decoded))
    return torch.clamp(out, -1, 1)


def _late_stages(decoder: Any, x: Tensor) -> Tensor:
    for block in decoder.up_blocks[1:]:
        x = block(x)
    out: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return out

"""Decodes only boxes around the edited cells.

The decoder's attention lies in its middle block. That and the first up block, which are cheap, see the whole picture.
The convolutions after them reach a few latents far, so a box with as much halo decodes to the whole picture's pixels,
to within rounding, if norms see one pixel each, as in Qwen's autoencoder. Group norms, as in AutoencoderKL, see all of
them: squares of the picture give their statistics, and the box's pixels come near the whole decode's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .sampled_norms import Stage, one_in, recorded, run, squares
from .single_frame_vae import is_compiled

LARGEST = 0.5  # share of the picture in boxes, halos included, from which the whole is decoded instead
WHOLE = 3  # stages that see the whole picture
SQUARE = 8  # latents a side of the squares that give a group norm's statistics


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
    if not isinstance(vae, (AutoencoderKL, AutoencoderKLQwenImage)):
        return f"{type(vae).__name__} is neither AutoencoderKL nor AutoencoderKLQwenImage"
    if vae.use_tiling:
        return "it decodes in tiles"
    if is_compiled(vae):
        return "it is compiled"
    if not isinstance(getattr(vae, "_hf_hook", None), (CpuOffload, type(None))):
        return "its layers are offloaded one by one"
    if any(hasattr(module, "_diffusers_hook") for module in vae.modules()):
        return "its layers are offloaded in groups"
    if any(isinstance(module, Attention) for module in vae.decoder.up_blocks.modules()):
        return "its up blocks attend to the whole picture"
    if len(vae.decoder.up_blocks) == 1:
        return "its decoder has one up block alone"
    return None


def stages(vae: Any) -> list[Stage]:
    """The decoder in parts that follow one another: first convolutions, middle block, up blocks, last norm, head."""
    decoder = vae.decoder
    first = [layer for layer in (vae.post_quant_conv, decoder.conv_in) if layer is not None]
    normed = isinstance(vae, AutoencoderKL)
    norm, act = (decoder.conv_norm_out, decoder.conv_act) if normed else (decoder.norm_out, decoder.nonlinearity)
    head = nn.Sequential(act, decoder.conv_out)
    return [nn.Sequential(*first), decoder.mid_block, *decoder.up_blocks, norm, head]


def halo(vae: Any) -> int:
    """Latents that the convolutions after the first up block reach; those of the i-th reach 2**-i latents each.

    An up block has two convolutions a residual block, and one after upsampling for the next. The head has one.
    """
    blocks = vae.decoder.up_blocks
    last, convolutions = len(blocks) - 1, 2 * len(blocks[0].resnets)
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


def sampled(vae: Any, height: int, width: int) -> int | None:
    """Of how many squares of the latents one gives group norms their statistics, or None."""
    return one_in(height, width, SQUARE) if isinstance(vae, AutoencoderKL) else None


def decode(vae: Any, latents: Tensor, boxes: list[list[Box]]) -> Tensor:
    """Latents as `vae.decode` takes them to pictures (B, 3, 8 h, 8 w), 0 outside the boxes."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)  # as before `vae.decode`: takes the transformer's place on the device
    height, width = latents.shape[-2:]
    scale, margin, every = 2 ** (len(vae.decoder.up_blocks) - 1), halo(vae), sampled(vae, height, width)
    out = latents.new_zeros(len(latents), vae.decoder.conv_out.out_channels, height * scale, width * scale)
    parts = stages(vae)
    early, late = parts[:WHOLE], parts[WHOLE:]
    for picture, sample, inside in zip(out, latents.split(1), boxes, strict=True):
        if not inside:
            continue
        seen = run(early, sample)
        moments = recorded(late[:-1], squares(seen, 2 * SQUARE, every)) if every else None
        for box in inside:
            outer = box.grown(margin, height, width)
            decoded = run(late, outer.times(2).of(seen), moments).flatten(0, -3)  # (3, H, W) of one picture or frame
            box.times(scale).of(picture).copy_(box.within(outer).times(scale).of(decoded))
    return torch.clamp(out, -1, 1)


def decoded_part(vae: Any, latents: Tensor, cells: Tensor, cell: int) -> tuple[Tensor, float] | None:
    """Pictures (B, 3, 8 h, 8 w), right in the cells, and the share of them that was decoded, with halos and squares.

    None where only the whole can be decoded, or the boxes are too large to save much. latents: as `vae.decode` takes
    them. cells (B, h, w) bool, each `cell` latents a side.
    """
    if why_whole(vae) is not None:
        return None
    height, width = latents.shape[-2:]
    every = sampled(vae, height, width)
    if isinstance(vae, AutoencoderKL) and every is None:
        return None
    boxes, share = plan(vae, cells, cell, height, width)
    if share >= LARGEST:
        return None
    squared = sum(bool(inside) for inside in boxes) / len(boxes) / every if every else 0.0
    return decode(vae, latents, boxes), share + squared

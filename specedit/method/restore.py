"""Putting the untouched part of the picture back: in latents (restore="reference") and in pixels (keep_pixels)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..layout import TokenGrid


def feather(cells: Tensor, scale: int, radius: int, size: tuple[int, int]) -> Tensor:
    """Weights (B, *size) in 0..1 that rise inside the edited cells: exactly 0 outside them, 1 from `radius` on inwards.

    cells (B, h, w) bool, each `scale` x `scale` samples of the result. The ramp is the upper half of a box blur, so
    even a cell on its own reaches 1 in its middle. The border of the picture is no seam.
    """
    inside = cells[:, None].float().repeat_interleave(scale, 2).repeat_interleave(scale, 3)[..., : size[0], : size[1]]
    blurred = F.avg_pool2d(F.pad(inside, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    return (inside * (2 * blurred - 1).clamp(0, 1))[:, 0]


def blend_latents(tokens: Tensor, reference: Tensor, edited: Tensor, grid: TokenGrid) -> Tensor:
    """Clean tokens (B, N, C) inside the edited cells, the reference's own outside.

    The seam is half a token wide, in whole latent pixels: one of packed tokens, none of unpacked ones.
    """
    patch = grid.geometry.patch
    h, w = grid.shape
    weight = feather(edited, 2 * patch, patch // 2, (patch * h, patch * w))  # a cell is two tokens a side
    return blend(tokens, reference, token_weights(weight, grid, tokens))


def token_weights(weight: Tensor, grid: TokenGrid, like: Tensor) -> Tensor:
    """Weights (B, h, w) of latent pixels as those of tokens (B, N, C), every channel alike."""
    geometry = grid.geometry
    return geometry.from_image(weight[:, None]).repeat(1, 1, like.shape[2] // geometry.pixels)


def blend(tokens: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """`tokens` by their weights, and exactly `reference` where the weight is 0."""
    return torch.where(weight == 0, reference, weight * tokens + (1 - weight) * reference)


def shown(edited: Tensor, cell: int, source: Tensor) -> Tensor:
    """How much of the result is shown at each pixel (B, H, W) of the source (B, 3, H, W): the feathered edit mask."""
    return feather(edited, cell, cell // 4, (source.shape[-2], source.shape[-1]))


def keep_pixels(
    images: Any, source: Tensor, edited: Tensor, cell: int, output_type: str, changed: Tensor | None = None
) -> Any:
    """Images with the source's own pixels outside the feathered edit mask, bit for bit.

    images: what the pipeline returns for `output_type`: list of PIL, array (B, H, W, 3) or tensor (B, 3, H, W) in 0..1.
    source (B, 3, H, W) float32 in 0..1; edited (B, h, w) bool cells of `cell` px. changed: (B, H, W) further weights,
    0 where the source's pixels are kept inside the mask too.
    """
    weight = shown(edited, cell, source)
    weight = weight if changed is None else weight * changed.to(weight)
    if output_type == "pt":
        own, share = source.to(images), weight[:, None].to(images)
        return torch.where(share == 0, own, share * images + (1 - share) * own)
    kept, mix = source.permute(0, 2, 3, 1).cpu().numpy(), weight[..., None].cpu().numpy()
    if output_type != "pil":  # as diffusers, which makes arrays of any other type's name
        return np.where(mix == 0, kept, mix * images + (1 - mix) * kept).astype(images.dtype)
    kept = (kept * 255).round().astype(np.uint8)
    out = []
    for image, k, m in zip(images, kept, mix, strict=True):
        blended = (m * np.asarray(image, dtype=np.float32) + (1 - m) * k).round().astype(np.uint8)
        out.append(Image.fromarray(np.where(m == 0, k, blended)))
    return out

"""Pixel restore, after MrFlow (arXiv 2607.01642): locked cells are upsampled as a picture, not as latents.

The mixed sequence runs to sigma 0. Its clean prediction is decoded at the coarse size, upsampled, and encoded again;
locked cells take the latents that come out, fine tokens keep their own. All tokens are renoised to
`pixel_restore_sigma`, from which one full step removes what upsampling has left behind. MrFlow upsamples the whole
picture with a pretrained network; this is bicubic interpolation, so that no other weights are needed.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import MixedLayout, mean_pixels
from .adapter import LayoutGroup, Run
from .groups import gather


def upsample_locked(run: Run, groups: list[LayoutGroup]) -> list[LayoutGroup]:
    """One group of all samples at full resolution, clean, from groups that have ended at sigma 0."""
    state = run.state
    with run.trace.timed("pixels"):
        clean = gather(groups, state)
        for group in groups:
            if not group.layout.is_fine:
                large = through_pixels(run, clean[group.rows])
                large[:, group.layout.fine_tokens] = clean[group.rows][:, group.layout.fine_tokens]
                clean[group.rows] = large
    fine = MixedLayout.all_fine(state.grid, state.device)
    return [LayoutGroup(list(range(state.batch)), fine, state.reference, state.beside(fine), clean, [0.0])]


def through_pixels(run: Run, tokens: Tensor) -> Tensor:
    """Clean tokens (b, N, C) of the full grid, reduced to the coarse one, decoded, upsampled and encoded."""
    adapter, pipe, grid = run.adapter, run.pipe, run.state.grid
    small = dataclasses.replace(run.state, grid=grid.coarse())
    pictures = adapter.decode(pipe, small, mean_pixels(tokens, grid), "pt").float()
    height, width = (run.state.pixels_per_token * side for side in grid.shape)
    large = F.interpolate(pictures, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    encoded: Tensor = adapter.encode(pipe, large[..., :height, :width], grid).to(tokens)
    if encoded.shape != tokens.shape:
        expected, got = tuple(tokens.shape), tuple(encoded.shape)
        raise ValueError(f"{adapter.name}: encode: expected tokens of shape {expected}, got {got}")
    return torch.clone(encoded)

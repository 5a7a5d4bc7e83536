"""The draft (paper, section 3.3.1): a complete trajectory at a fraction of the tokens, to see what the edit does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import MixedLayout, TokenGrid, mean_pixels
from .adapter import EditState, LayoutGroup, Run
from .denoise import group_velocity, reference_kv_cache


def shrink(tokens: Tensor, grid: TokenGrid, scale: int) -> tuple[Tensor, TokenGrid]:
    """Clean tokens at `scale` times less a side (eq. 4): repeated 2 x 2 means of latent pixels."""
    while scale > 1:
        tokens, grid, scale = mean_pixels(tokens, grid), grid.coarse(), scale // 2
    return tokens, grid


def small_reference(state: EditState, scale: int) -> Tensor:
    """All references at `scale` times less a side, each averaged over the cells of the output."""
    each = zip(state.references, state.placements, strict=True)
    return torch.cat([shrink(*place.with_lead(tokens, scale), scale)[0] for tokens, place in each], 1)


def generate(run: Run, on_step: Callable[[], None]) -> LayoutGroup:
    """Denoise the draft (eq. 5), a small image of its own: own positions, own schedule.

    Returns all samples, with their clean tokens (B, n, C), and what they cost.
    """
    state, config, adapter = run.state, run.config, run.adapter
    grid = state.grid.coarse(config.draft_scale)
    reference = small_reference(state, config.draft_scale)
    tokens = state.draw(grid.tokens)
    layout = MixedLayout.all_fine(grid, state.device)
    reference_layout = state.beside(layout, config.draft_scale)
    sigmas = adapter.sigmas(run.pipe, grid.tokens, 1.0, 0.0, config.draft_steps).tolist()
    group = LayoutGroup(list(range(state.batch)), layout, reference, reference_layout, tokens, sigmas)
    group.kv = reference_kv_cache(adapter, config)
    for i in range(config.draft_steps):
        if run.pipe.interrupt:
            break
        velocity = group_velocity(run, group, i)
        group.tokens = group.tokens + (sigmas[i + 1] - sigmas[i]) * velocity
        on_step()
    group.kv = None
    return group


def upsample(tokens: Tensor, grid: TokenGrid, scale: int, target: TokenGrid) -> Tensor:
    """Clean tokens of a draft on the fine grid it was drawn for (U_s of eq. 6): bilinear in latent pixels."""
    b, _, c = tokens.shape
    image = tokens.view(b, *grid.shape, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * grid.height, -1)
    large = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    large = large[..., : 2 * target.height, : 2 * target.width]
    patches = large.reshape(b, c // 4, target.height, 2, target.width, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, target.tokens, c)

"""The draft (paper, section 3.3.1): a complete trajectory at a fraction of the tokens, to see what the edit does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layout import MixedLayout, TokenGrid, mean_pixels
from .adapter import EditState, LayoutGroup, Run
from .caches import drop_caches, reference_kv_cache
from .denoise import euler_step


def shrink(tokens: Tensor, grid: TokenGrid, scale: int) -> tuple[Tensor, TokenGrid]:
    """Clean tokens at `scale` times less a side (eq. 4): repeated 2 x 2 means of latent pixels."""
    while scale > 1:
        tokens, grid, scale = mean_pixels(tokens, grid), grid.coarse(), scale // 2
    return tokens, grid


def small_reference(state: EditState, scale: int) -> Tensor:
    """All references at `scale` times less a side, each averaged over the cells of the output.

    As they are where they are computed once a run.
    """
    if state.fixed_prefix:
        return state.reference
    each = zip(state.references, state.placements, strict=True)
    return torch.cat([shrink(*place.with_lead(tokens, scale), scale)[0] for tokens, place in each], 1)


def generate(run: Run) -> LayoutGroup:
    """Denoise the draft (eq. 5), a small image of its own: own positions, own schedule.

    Returns all samples, with their clean tokens (B, n, C).
    """
    trace = run.trace
    with trace.running("draft") as stage:
        run = replace(run, state=run.adapter.draft_state(run))
        group = start(run)
        stage.start(run, [group])
        for i in range(run.config.draft_steps):
            if trace.interrupted:
                break
            euler_step(run, group, i)
            trace.after_step(run, [group], i, draft=True)
        drop_caches([group])
    return group


def skip(run: Run) -> None:
    """Draw a draft's noise without making one, so that the noise drawn later is that of a run with it."""
    run.state.draw(run.state.grid.coarse(run.config.draft_scale).tokens)


def start(run: Run) -> LayoutGroup:
    """Noise and small references (eq. 4) of a draft."""
    state, config = run.state, run.config
    grid = state.grid.coarse(config.draft_scale)
    reference = small_reference(state, config.draft_scale)
    tokens = state.draw(grid.tokens)
    layout = MixedLayout.all_fine(grid, state.device)
    beside = state.beside(layout, config.draft_scale)
    sigmas = run.adapter.sigmas(run.pipe, grid.tokens, 1.0, 0.0, config.draft_steps).tolist()
    rows = list(range(state.batch))
    return LayoutGroup(rows, layout, reference, beside, tokens, sigmas, kv=reference_kv_cache(run))


def upsample(tokens: Tensor, grid: TokenGrid, scale: int, target: TokenGrid) -> Tensor:
    """Clean tokens of a draft on the fine grid it was drawn for (U_s of eq. 6): bilinear in latent pixels."""
    geometry = grid.geometry
    image = geometry.to_image(tokens, grid.shape)
    large = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    height, width = (geometry.patch * side for side in target.shape)
    return geometry.from_image(large[..., :height, :width])

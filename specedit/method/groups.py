"""The samples of a batch in groups that share a layout, brought from one stage to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import LayoutSet, MixedLayout, mean_pixels
from ..placement import Placement
from .adapter import EditState, LayoutGroup, Run
from .expand import coarsen_noise, refine_layout, renoise
from .schedule import Stage

SAME_SIGMA = 1e-6  # a stage's last noise level is float32's, its boundary is not


def stage_layouts(stage: Stage, state: EditState, expanded: Tensor) -> list[MixedLayout]:
    """One layout for each sample; equal masks share one object."""
    if stage.name == "coarse":
        return [MixedLayout.all_coarse(state.grid, state.device)] * state.batch
    if stage.name == "full":
        return [MixedLayout.all_fine(state.grid, state.device)] * state.batch
    seen: dict[bytes, MixedLayout] = {}
    keys = [mask.cpu().numpy().tobytes() for mask in expanded]
    return [seen.setdefault(key, MixedLayout(state.grid, mask)) for key, mask in zip(keys, expanded, strict=True)]


def start_stage(
    run: Run, parts: list[LayoutGroup], layouts: list[MixedLayout], stage: Stage, split_noise: Tensor, known: Tensor
) -> list[LayoutGroup]:
    """Bring the state to a stage's layouts and noise level (eq. 8, and the renoising that goes with it)."""
    state = run.state
    fresh = state.draw(state.grid.tokens) if parts else None
    before = {row: (part, k) for part in parts for k, row in enumerate(part.rows)}
    # Samples run together that share a layout and come from the same noise level.
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, layout in enumerate(layouts):
        same = row in before and torch.equal(before[row][0].layout.expanded, layout.expanded)
        groups.setdefault((id(layout), same), []).append(row)
    entered = []
    for (_, same), rows in groups.items():
        layout = layouts[rows[0]]
        moved = []
        for row in rows:
            one = slice(row, row + 1)
            if not parts:
                moved.append(start_tokens(state.noise[one], layout))
                continue
            part, k = before[row]
            tokens, _ = refine_layout(
                part.tokens[k : k + 1], part.layout, layout, part.sigmas[-1],
                split_noise=split_noise[one], fresh_noise=fresh[one], known_detail=known[one], backend=state.backend,
            )  # fmt: skip
            moved.append(tokens)
        tokens, start = torch.cat(moved), stage.start
        if same:
            # A layout that did not change goes on where the last stage ended, unless this one ends above that.
            start = before[rows[0]][0].sigmas[-1]
            if start <= stage.end + SAME_SIGMA:
                fresh_tokens = start_tokens(fresh[rows], layout)
                tokens, start = renoise(tokens, start, stage.start, fresh_tokens), stage.start
        reference_layout = state.beside(layout)
        reference = reference_on_layout(state.reference[rows], reference_layout)
        sigmas = run.adapter.sigmas(run.pipe, layout.tokens, start, stage.end, stage.steps).tolist()
        entered.append(LayoutGroup(rows, layout, reference, reference_layout, tokens, sigmas))
    return entered


def start_tokens(noise: Tensor, layout: MixedLayout) -> Tensor:
    """The call's white noise on a layout: white too, because the sum coefficient of four is."""
    coarse = coarsen_noise(noise, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, noise[:, layout.fine_tokens]], 1)


def reference_on_layout(reference: Tensor, layout: MixedLayout | LayoutSet) -> Tensor:
    """The clean reference at a layout's resolutions: coarse where the target is coarse."""
    if layout.is_fine:
        return reference
    if isinstance(layout, LayoutSet):
        each = reference.split([part.picture.tokens for part in layout.parts], 1)
        return torch.cat([reference_on_layout(one, part) for one, part in zip(each, layout.parts, strict=True)], 1)
    reference = Placement(layout.grid, layout.picture, *layout.lead).place(reference)
    coarse = mean_pixels(reference, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, reference[:, layout.fine_tokens]], 1)


def gather(parts: list[LayoutGroup], state: EditState) -> Tensor:
    """All samples on the full grid (B, N, C)."""
    out = torch.empty_like(state.noise)
    for part in parts:
        for row, own in zip(part.rows, part.layout.full_grid(part.tokens), strict=True):  # a list would be sent over
            out[row] = own
    return out

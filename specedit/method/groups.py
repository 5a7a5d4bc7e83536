"""The samples of a batch in groups that share a layout, brought from one stage to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import LayoutSet, MixedLayout, TokenGrid, mean_pixels
from ..placement import Placement
from .adapter import EditState, LayoutGroup, Run
from .cells import CellMasks
from .expand import coarsen_noise, refine_layout, renoise
from .schedule import Stage, stage_start


def start_stage(run: Run, before: list[LayoutGroup], stage: Stage, cells: CellMasks) -> list[LayoutGroup]:
    """Bring the state to a stage's layouts and noise level (eq. 8, and the renoising that goes with it).

    before: the groups of the previous stage; none for the first one, which starts from the call's noise, below sigma 1
    with the picture being edited under it.
    """
    layouts, apart = stage_layouts(stage, run.state, cells), run.config.reference_keep is not None
    if not before:
        begun = {
            row: first_tokens(run.state, slice(row, row + 1), layout, stage.start) for row, layout in enumerate(layouts)
        }
        return [
            new_group(run, rows, layouts[rows[0]], torch.cat([begun[row] for row in rows]), stage, stage.start)
            for rows in alike(layouts, [False] * len(layouts), apart)
        ]
    state = run.state
    fresh = state.draw(state.grid.tokens)
    split_noise = state.split_noise
    known = state.reference_detail * detail_share(state, cells, stage)[:, :, None, None, None]
    held = {row: (group, k) for group in before for k, row in enumerate(group.rows)}
    same = [torch.equal(held[row][0].layout.expanded, layout.expanded) for row, layout in enumerate(layouts)]
    groups = []
    for rows in alike(layouts, same, apart):
        layout, moved = layouts[rows[0]], []
        for row in rows:
            group, k = held[row]
            one = slice(row, row + 1)
            tokens, _ = refine_layout(
                group.tokens[k : k + 1], group.layout, layout, group.sigmas[-1], split_noise=split_noise[one],
                fresh_noise=fresh[one], known_detail=known[one], backend=state.backend,
            )  # fmt: skip
            moved.append(tokens)
        tokens, ended = torch.cat(moved), held[rows[0]][0].sigmas[-1]
        start = stage_start(stage, ended, same_layout=same[rows[0]])
        if same[rows[0]] and start != ended:
            tokens = renoise(tokens, ended, start, start_tokens(fresh[rows], layout))
        groups.append(new_group(run, rows, layout, tokens, stage, start))
    return groups


def stage_layouts(stage: Stage, state: EditState, cells: CellMasks) -> list[MixedLayout]:
    """One layout for each sample; equal masks share one object."""
    if stage.name == "coarse":
        return [MixedLayout.all_coarse(state.grid, state.device)] * state.batch
    if stage.name == "full":
        return [MixedLayout.all_fine(state.grid, state.device)] * state.batch
    return split_layouts(state.grid, cells.refined)


def split_layouts(grid: TokenGrid, split: Tensor, counted: int | None = None) -> list[MixedLayout]:
    """A layout for each sample of the cells to split (B, cells_h, cells_w) bool; equal masks share one object.

    counted: as of the layouts.
    """
    seen: dict[bytes, MixedLayout] = {}
    keys = [mask.cpu().numpy().tobytes() for mask in split]
    return [
        seen.setdefault(key, MixedLayout(grid, mask, counted=counted)) for key, mask in zip(keys, split, strict=True)
    ]


def alike(layouts: list[MixedLayout], same: list[bool], apart: bool = False) -> list[list[int]]:
    """Samples that run together: they share a layout and come from the same noise level. apart: each by itself."""
    groups: dict[tuple[MixedLayout, bool, int], list[int]] = {}
    for row, layout in enumerate(layouts):
        groups.setdefault((layout, same[row], row if apart else 0), []).append(row)
    return list(groups.values())


def new_group(
    run: Run, rows: list[int], layout: MixedLayout, tokens: Tensor, stage: Stage, start: float
) -> LayoutGroup:
    """A group at the beginning of a stage, on the model's own schedule."""
    sigmas = run.adapter.sigmas(run.pipe, layout.tokens, start, stage.end, stage.steps).tolist()
    return group_at(run, rows, layout, tokens, sigmas)


def group_at(run: Run, rows: list[int], layout: MixedLayout, tokens: Tensor, sigmas: list[float]) -> LayoutGroup:
    """A group that will run through `sigmas`, with the references at its layout's resolutions."""
    beside = run.state.beside(layout)
    return LayoutGroup(rows, layout, reference_on_layout(run.state.reference[rows], beside), beside, tokens, sigmas)


def detail_share(state: EditState, cells: CellMasks, stage: Stage) -> Tensor:
    """(B, cells): how much of the picture's detail a cell has that is expanded at a stage's start, at noise level s'.

    All of it where the cell is known not to change. Others have what the run has begun with, (1-s) of the detail, where
    it began at noise level s: the expansion multiplies by 1-s'.
    """
    begun = 0.0 if state.start == 1 else (1 - state.start) / (1 - stage.start)
    return cells.known_unchanged.flatten(1).float().clamp(min=begun)


def first_tokens(state: EditState, rows: slice, layout: MixedLayout, sigma: float) -> Tensor:
    """Tokens (b, n, C) of some samples at the run's beginning: (1-s) x0 + s e, on a layout, where x0 is the picture.

    Coarse tokens are those of the fine state at 2s/(1+s), contracted.
    """
    noise = start_tokens(state.noise[rows], layout)
    if sigma == 1:
        return noise
    return (1 - sigma) * reference_on_layout(state.aligned[rows], layout) + sigma * noise


def start_tokens(noise: Tensor, layout: MixedLayout) -> Tensor:
    """The call's white noise on a layout: white too, because the sum coefficient of four is."""
    coarse = coarsen_noise(noise, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, noise[:, layout.fine_tokens]], 1)


def reference_on_layout(reference: Tensor, layout: MixedLayout | LayoutSet) -> Tensor:
    """The clean reference at a layout's resolutions: coarse where the target is coarse."""
    if layout.is_fine:
        return reference
    if isinstance(layout, LayoutSet):
        each = reference.split([one.picture.tokens for one in layout.layouts], 1)
        return torch.cat([reference_on_layout(*pair) for pair in zip(each, layout.layouts, strict=True)], 1)
    reference = Placement(layout.grid, layout.picture, *layout.lead).place(reference)
    coarse = mean_pixels(reference, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, reference[:, layout.fine_tokens]], 1)


def gather(groups: Sequence[LayoutGroup], state: EditState) -> Tensor:
    """All samples on the full grid (B, N, C)."""
    out = torch.empty_like(state.noise)
    for group in groups:
        for row, own in zip(group.rows, group.layout.full_grid(group.tokens), strict=True):  # a list would be sent over
            out[row] = own
    return out

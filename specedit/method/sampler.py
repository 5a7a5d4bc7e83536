"""SpecEdit's sampler, as section 3 of the paper tells it (arXiv 2605.02152).

draft (3.3.1) -> verify (3.3.2) -> coarse -> expand (3.4.1, 3.4.2) -> mixed (3.4.3) -> restore

Beyond it: where cells are kept for good, what the coarse stage is about to change is verified too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import FULL_EDIT_SHARE, SpecEditConfig
from ..forecast import ForecastRunner
from ..layout import LayoutSet, MixedLayout, mean_pixels
from ..placement import Placement
from ..registry import selectors
from ..run_report import StageReport
from . import draft as drafts
from . import restore
from . import selectors as select
from .adapter import Adapter, EditState
from .denoise import LayoutGroup, group_velocity, reference_kv_cache
from .expand import cell_detail, coarsen_noise, refine_layout, renoise
from .masks import cells_of_mask
from .schedule import Stage, stage_sigmas, stages

SAME_SIGMA = 1e-6  # a stage's last noise level is float32's, its boundary is not


@dataclass
class Outcome:
    """What a run found: clean tokens of the full grid (B, N, C), and where it looked."""

    tokens: Tensor
    score: Tensor | None
    edited: Tensor
    expanded: Tensor
    stages: list[StageReport]
    cache_bytes: int = 0
    empty_drafts: int = 0  # samples in whose draft nothing showed
    has_edit_mask: bool = True  # whether a draft or a mask says what is edited
    overflowed: int = 0  # samples whose score is not finite


def run(
    adapter: Adapter, pipe: Any, state: EditState, config: SpecEditConfig, edit_mask: Any, listener: Any
) -> Outcome:
    """Edit one batch. `listener` hears of every step: `draft_step()` and `step(index, sigma, tokens) -> tokens`."""
    log: list[StageReport] = []
    plan = stages(config)
    make_histories = forecasting(adapter, pipe, state, config)

    # Section 3.3: draft the edit at a fraction of the tokens, see which cells it changes.
    score, seen = find_edit(adapter, pipe, state, config, edit_mask, listener, log)
    drafted = config.uses_draft and edit_mask is None
    empty_drafts = int((~seen.flatten(1).any(1)).sum()) if score is not None else 0
    overflowed = int(select.not_finite(score).sum()) if score is not None else 0
    # The other selectors rank cells: what they leave out may change as well, unless it is given back as it came.
    verified = drafted and (selectors[config.selector].verifies or config.preserves_unedited)
    cells = Cells.of(seen, state, config, has_edit_mask=verified or edit_mask is not None)

    # Section 3.4: coarse tokens first, then a mixed sequence, then (restore="full") every token fine.
    detail = cell_detail(state.aligned, state.grid)
    split_noise = cell_detail(state.noise, state.grid, mode="circular")
    parts: list[LayoutGroup] = []
    done = cache_bytes = 0
    for stage in plan:
        if pipe.interrupt and parts:
            break
        began, first = clock(state), done
        layouts = stage_layouts(stage, state, cells.expanded)
        known = detail * cells.unchanged.flatten(1)[:, :, None, None, None]
        parts = enter(parts, layouts, stage, state, split_noise, known, pipe)
        looks = stage.name == "coarse" and drafted and config.verifies_coarse
        for part in parts:
            if make_histories is not None:
                part.histories = make_histories(first=stage is plan[0], layout=part.layout)
            part.kept = reference_kv_cache(adapter, config)
        for i in range(stage.steps):
            if pipe.interrupt:
                break
            for part in parts:  # eq. 11: one Euler step of each sample's own sequence
                velocity = group_velocity(adapter, pipe, state, part, i, config)
                if looks:
                    part.clean = part.tokens - part.sigmas[i] * velocity
                part.tokens = part.tokens + (part.sigmas[i + 1] - part.sigmas[i]) * velocity
            cache_bytes = max(cache_bytes, sum(part.cache_bytes for part in parts))
            notify(listener, done, parts, i, state)
            done += 1
        log.append(account(stage.name, parts, done - first, pipe, state, clock(state) - began))
        for part in parts:  # caches end with their stage, before the second look needs the memory
            part.histories = part.kept = None
        if looks and not pipe.interrupt:
            began = clock(state)
            seen = seen | second_look(adapter, pipe, state, parts, config)
            cells = Cells.of(seen, state, config, has_edit_mask=True)
            log.append(StageReport("second look", None, None, 0, 0, 0.0, clock(state) - began))

    tokens = gather(parts, state)
    if config.restore == "reference" and done == config.nfe:  # an interrupted run has nothing clean to blend
        tokens = restore.blend_latents(tokens, state.aligned, cells.edited, state.grid)
    has_edit_mask = drafted or edit_mask is not None
    return Outcome(
        tokens, score, cells.found, cells.expanded, log, cache_bytes, empty_drafts, has_edit_mask, overflowed
    )


@dataclass
class Cells:
    """What becomes of each cell, (B, cells_h, cells_w) bool.

    found: reported as edited. edited: not taken from the reference; a sample that is nearly all edited is edited as a
    whole. expanded: computed at full resolution. unchanged: somebody looked and found no edit, so that the detail is
    known, the reference's.
    """

    found: Tensor
    edited: Tensor
    expanded: Tensor
    unchanged: Tensor

    @staticmethod
    def of(seen: Tensor, state: EditState, config: SpecEditConfig, has_edit_mask: bool) -> Cells:
        """`seen`: cells that a draft, a mask or the coarse stage says change. `has_edit_mask`: whether any of them ran."""
        found = seen
        if config.preserves_unedited:
            # Keeping everything would return the input, and who sees no change at all may have missed it.
            found = seen | ~seen.flatten(1).any(1)[:, None, None]
        if state.uncovered_cells is not None:  # where there is no picture, nothing can be taken from it
            found = found | state.uncovered_cells
        edited = everything_if_nearly(found)
        # Eq. 10: expand what is edited, and a sparse uniform set beside it.
        expanded = edited | select.uniform_cells(state.grid, config.uniform_stride, state.device)
        return Cells(found, edited, expanded, ~edited & has_edit_mask)


def second_look(
    adapter: Adapter, pipe: Any, state: EditState, parts: list[LayoutGroup], config: SpecEditConfig
) -> Tensor:
    """Cells (B, cells_h, cells_w) that the coarse stage's clean prediction changes, verified as a draft is."""
    clean = torch.empty_like(state.noise[:, : state.grid.coarse().tokens])
    for part in parts:
        clean[part.rows] = part.clean
    small, grid = drafts.shrink(clean, state.grid.coarse(), config.draft_scale // 2)
    return select.select(adapter, pipe, state, small, grid, config)[1]


def forecasting(
    adapter: Adapter, pipe: Any, state: EditState, config: SpecEditConfig
) -> Callable[..., ForecastRunner] | None:
    """What makes a part's temporal cache, or None where the configuration has none. Errors come before any work."""
    options = config.forecast_options
    if options is None:
        return None
    if options.token_wise and not adapter.token_wise:
        raise ValueError(
            f"forecast: {options.name!r} computes single tokens again, which {adapter.name} does not offer; "
            "expected another forecast"
        )
    shared = options.prepare(pipe)
    return partial(ForecastRunner, options, branches=state.branches, shared=shared, backend=state.backend)


def find_edit(adapter, pipe, state, config, edit_mask, listener, log) -> tuple[Tensor | None, Tensor]:
    """Score on the token grid and edited cells (B, cells_h, cells_w): by draft and verification, or from a mask."""
    cells = torch.zeros((state.batch, *state.grid.coarse().shape), dtype=torch.bool, device=state.device)
    if edit_mask is not None:
        return None, cells_of_mask(edit_mask, state)
    if not config.uses_draft:  # nothing depends on a mask, or the selector takes none
        return None, cells
    began = clock(state)
    small = adapter.draft_state(pipe, state, config)
    done = 0  # fewer than asked after an interrupt

    def step() -> None:
        nonlocal done
        done += 1
        listener.draft_step()

    draft = drafts.generate(adapter, pipe, small, config, step)
    tokens = draft.layout.tokens + draft.reference_layout.tokens + small.text_tokens
    seconds = clock(state) - began
    log.append(StageReport("draft", 1.0, 0.0, done, tokens, draft.flops, seconds, reused=draft.reused))
    began = clock(state)
    score, edited = select.select(adapter, pipe, state, draft.tokens, draft.layout.grid, config)
    log.append(StageReport("verify", None, None, 0, 0, 0.0, clock(state) - began))
    return score, edited


def everything_if_nearly(edited: Tensor) -> Tensor:
    """Samples that are nearly all edited are edited as a whole: then every restore is the full one."""
    share = edited.flatten(1).float().mean(1)
    return edited | (share > FULL_EDIT_SHARE)[:, None, None]


def stage_layouts(stage: Stage, state: EditState, expanded: Tensor) -> list[MixedLayout]:
    """One layout for each sample; equal masks share one object."""
    if stage.name == "coarse":
        return [MixedLayout.all_coarse(state.grid, state.device)] * state.batch
    if stage.name == "full":
        return [MixedLayout.all_fine(state.grid, state.device)] * state.batch
    seen: dict[bytes, MixedLayout] = {}
    keys = [mask.cpu().numpy().tobytes() for mask in expanded]
    return [seen.setdefault(key, MixedLayout(state.grid, mask)) for key, mask in zip(keys, expanded, strict=True)]


def enter(
    parts: list[LayoutGroup], layouts: list[MixedLayout], stage: Stage, state: EditState, split_noise, known, pipe
):
    """Bring the state to a stage's layouts and noise level (eq. 8, and the renoising that goes with it)."""
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
        reference = restrict(state.reference[rows], reference_layout)
        sigmas = stage_sigmas(pipe.scheduler, layout.tokens, start, stage.end, stage.steps).tolist()
        entered.append(LayoutGroup(rows, layout, reference, reference_layout, tokens, sigmas))
    return entered


def start_tokens(noise: Tensor, layout: MixedLayout) -> Tensor:
    """The call's white noise on a layout: white too, because the sum coefficient of four is."""
    coarse = coarsen_noise(noise, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, noise[:, layout.fine_tokens]], 1)


def restrict(reference: Tensor, layout: MixedLayout | LayoutSet) -> Tensor:
    """The clean reference at a layout's resolutions: coarse where the target is coarse."""
    if layout.is_fine:
        return reference
    if isinstance(layout, LayoutSet):
        each = reference.split([part.picture.tokens for part in layout.parts], 1)
        return torch.cat([restrict(one, part) for one, part in zip(each, layout.parts, strict=True)], 1)
    reference = Placement(layout.grid, layout.picture, *layout.lead).place(reference)
    coarse = mean_pixels(reference, layout.grid)[:, layout.locked_cells]
    return torch.cat([coarse, reference[:, layout.fine_tokens]], 1)


def notify(listener: Any, index: int, parts: list[LayoutGroup], i: int, state: EditState) -> None:
    """Tell the listener of a step; it may hand back other full-grid latents."""
    answer = listener.step(index, parts[0].sigmas[i], lambda: gather(parts, state))
    if answer is not None:
        tokens, changed = answer
        for part in parts:
            new = part.layout.from_full_grid(torch.stack([tokens[row] for row in part.rows]).to(part.tokens))
            part.tokens = new if changed is None else torch.where(changed, new, part.tokens)


def gather(parts: list[LayoutGroup], state: EditState) -> Tensor:
    """All samples on the full grid (B, N, C)."""
    out = torch.empty_like(state.noise)
    for part in parts:
        for row, own in zip(part.rows, part.layout.full_grid(part.tokens), strict=True):  # a list would be sent over
            out[row] = own
    return out


def account(
    name: str, parts: list[LayoutGroup], steps: int, pipe: Any, state: EditState, seconds: float
) -> StageReport:
    tokens = {row: p.layout.tokens + p.reference_layout.tokens + state.text_tokens for p in parts for row in p.rows}
    flops = sum(part.flops for part in parts)
    mean = sum(tokens.values()) / len(tokens)
    first = parts[0]
    return StageReport(
        name, first.sigmas[0], first.sigmas[steps], steps, mean, flops, seconds, first.cached, first.reused
    )


def clock(state: EditState) -> float:
    """Seconds, after the device has finished: between stages only, never inside the loop."""
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return time.perf_counter()

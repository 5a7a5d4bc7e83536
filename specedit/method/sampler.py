"""SpecEdit's sampler, as section 3 of the paper tells it (arXiv 2605.02152).

draft (3.3.1) -> verify (3.3.2) -> coarse -> expand (3.4.1, 3.4.2) -> mixed (3.4.3) -> restore

Beyond it: where cells are kept for good, what the coarse stage is about to change is verified too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import FULL_EDIT_SHARE, SpecEditConfig
from ..forecast import ForecastRunner
from ..registry import selectors
from ..run_report import StageReport
from . import draft as drafts
from . import restore
from . import selectors as select
from .adapter import Adapter, EditState, LayoutGroup, Run
from .denoise import group_velocity, reference_kv_cache
from .expand import cell_detail
from .groups import gather, stage_layouts, start_stage
from .masks import cells_of_mask
from .schedule import stages


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


def edit(run: Run, edit_mask: Any, listener: Any) -> Outcome:
    """Edit one batch. `listener` hears of every step: `draft_step()` and `step(index, sigma, tokens) -> tokens`."""
    adapter, pipe, state, config = run.adapter, run.pipe, run.state, run.config
    log: list[StageReport] = []
    plan = stages(config)
    make_histories = forecasting(adapter, pipe, state, config)

    # Section 3.3: draft the edit at a fraction of the tokens, see which cells it changes.
    score, seen = find_edit(run, edit_mask, listener, log)
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
        parts = start_stage(run, parts, layouts, stage, split_noise, known)
        looks = stage.name == "coarse" and drafted and config.verifies_coarse
        for part in parts:
            if make_histories is not None:
                part.forecast = make_histories(first=stage is plan[0], layout=part.layout)
            part.kv = reference_kv_cache(adapter, config)
        for i in range(stage.steps):
            if pipe.interrupt:
                break
            for part in parts:  # eq. 11: one Euler step of each sample's own sequence
                velocity = group_velocity(run, part, i)
                if looks:
                    part.clean = part.tokens - part.sigmas[i] * velocity
                part.tokens = part.tokens + (part.sigmas[i + 1] - part.sigmas[i]) * velocity
            cache_bytes = max(cache_bytes, sum(part.cache_bytes for part in parts))
            notify(listener, done, parts, i, state)
            done += 1
        log.append(account(stage.name, parts, done - first, pipe, state, clock(state) - began))
        for part in parts:  # caches end with their stage, before the second look needs the memory
            part.forecast = part.kv = None
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
        """`seen`: cells that a draft, a mask or the coarse stage says change."""
        found = seen
        if config.preserves_unedited:
            # Keeping everything would return the input, and who sees no change at all may have missed it.
            found = seen | ~seen.flatten(1).any(1)[:, None, None]
        if state.uncovered_cells is not None:  # where there is no picture, nothing can be taken from it
            found = found | state.uncovered_cells
        edited = everything_if_nearly(found)
        # Eq. 10: expand what is edited, and a sparse uniform set beside it.
        expanded = edited | select.uniform_cells(state.grid, config.uniform_stride or 0, state.device)
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
    """What makes a group's temporal cache, or None where the configuration has none. Errors come before any work."""
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


def find_edit(run, edit_mask, listener, log) -> tuple[Tensor | None, Tensor]:
    """Score on the token grid and edited cells (B, cells_h, cells_w): by draft and verification, or from a mask."""
    state, config = run.state, run.config
    cells = torch.zeros((state.batch, *state.grid.coarse().shape), dtype=torch.bool, device=state.device)
    if edit_mask is not None:
        return None, cells_of_mask(edit_mask, state)
    if not config.uses_draft:  # nothing depends on a mask, or the selector takes none
        return None, cells
    began = clock(state)
    small = run.adapter.draft_state(run)
    done = 0  # fewer than asked after an interrupt

    def step() -> None:
        nonlocal done
        done += 1
        listener.draft_step()

    draft = drafts.generate(replace(run, state=small), step)
    tokens = draft.layout.tokens + draft.reference_layout.tokens + small.text_tokens
    seconds = clock(state) - began
    log.append(StageReport("draft", 1.0, 0.0, done, tokens, draft.flops, seconds, reused=draft.reused))
    began = clock(state)
    score, edited = select.select(run.adapter, run.pipe, state, draft.tokens, draft.layout.grid, config)
    log.append(StageReport("verify", None, None, 0, 0, 0.0, clock(state) - began))
    return score, edited


def everything_if_nearly(edited: Tensor) -> Tensor:
    """Samples that are nearly all edited are edited as a whole: then every restore is the full one."""
    share = edited.flatten(1).float().mean(1)
    return edited | (share > FULL_EDIT_SHARE)[:, None, None]


def notify(listener: Any, index: int, parts: list[LayoutGroup], i: int, state: EditState) -> None:
    """Tell the listener of a step; it may hand back other full-grid latents."""
    answer = listener.step(index, parts[0].sigmas[i], lambda: gather(parts, state))
    if answer is not None:
        tokens, changed = answer
        for part in parts:
            new = part.layout.from_full_grid(torch.stack([tokens[row] for row in part.rows]).to(part.tokens))
            part.tokens = new if changed is None else torch.where(changed, new, part.tokens)


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

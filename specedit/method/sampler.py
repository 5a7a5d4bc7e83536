"""SpecEdit's sampler, as section 3 of the paper tells it (arXiv 2605.02152).

draft (3.3.1) -> verify (3.3.2) -> coarse -> expand (3.4.1, 3.4.2) -> mixed (3.4.3) -> restore

Beyond the paper: where unedited cells are given back, the end of the coarse stage is verified too; with draft_steps=0
it is verified instead of a draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..registry import selectors
from . import draft as drafts
from . import restore, verify
from .adapter import LayoutGroup, Run
from .caches import cache_maker, drop_caches
from .cells import CellMasks, no_cells
from .denoise import euler_step
from .groups import gather, start_stage
from .locked import leave_out_locked
from .masks import cells_of_mask
from .pixels import upsample_locked
from .reference_selection import select_reference
from .schedule import stages
from .selectors import not_finite


@dataclass
class Outcome:
    """What a run found: clean tokens of the full grid (B, N, C), the score if there is one, and every cell's fate.

    has_edit_mask: whether a verification or a mask says what is edited. empty_drafts: samples whose draft (or coarse
    stage, where that is verified instead) changes no cell. overflowed: samples whose score is not finite.
    """

    tokens: Tensor
    score: Tensor | None
    cells: CellMasks
    has_edit_mask: bool
    empty_drafts: int = 0
    overflowed: int = 0


def edit(run: Run, edit_mask: Any = None) -> Outcome:
    """Edit one batch. edit_mask: the caller's, as `masks.read` takes it, in place of draft and verification."""
    config, trace, state = run.config, run.trace, run.state
    make_caches = cache_maker(run)

    # Section 3.3: draft the edit at a fraction of the tokens, and verify which cells it changes.
    score, detected, empty, searches = None, no_cells(run), 0, config.finds_cells and edit_mask is None
    if edit_mask is not None:
        detected = cells_of_mask(edit_mask, state)
    elif config.uses_draft:
        score, detected = find_cells(run)
        empty = count_empty(detected)

    # Other selectors rank cells: what they leave out may change as well, unless it is given back as it came.
    verifies = edit_mask is not None or selectors[config.selector].verifies or config.preserves_unedited
    known = edit_mask is not None or config.uses_draft
    cells = CellMasks.from_detected(run, detected, verified=verifies and known)  # 3.4.2, eq. 9 and 10

    # Section 3.4: coarse tokens first, then a mixed sequence, then (restore="full") every token fine.
    groups: list[LayoutGroup] = []
    for number, stage in enumerate(stages(config, state.start)):
        if trace.interrupted and groups:
            break
        if stage.name == "full" and config.restore == "pixels":
            groups = upsample_locked(run, groups)
        looks = stage.name == "coarse" and searches and config.verifies_coarse
        with trace.running(stage.name) as running:
            groups = leave_out_locked(run, start_stage(run, groups, stage, cells))  # 3.4.1, eq. 8
            groups = select_reference(run, groups, stage, cells)
            running.start(run, groups)
            make_caches(groups, number == 0)
            for i in range(stage.steps):
                if trace.interrupted:
                    break
                for group in groups:
                    euler_step(run, group, i, keep_clean=looks)  # 3.4.3, eq. 11
                trace.after_step(run, groups, i)
        drop_caches(groups)  # before `verify_coarse` needs the memory
        if looks and not trace.interrupted:
            seen, found = verify.verify_coarse(run, groups)
            if not known:
                score, empty, known = seen, count_empty(found), True
            cells = CellMasks.from_detected(run, detected | found, verified=verifies)

    tokens = gather(groups, state)
    if config.restore == "reference" and trace.steps == config.nfe:  # an interrupted run has nothing clean to blend
        tokens = restore.blend_latents(tokens, state.aligned, cells.edited, state.grid)
    overflowed = 0 if score is None else int(not_finite(score).sum())
    return Outcome(tokens, score, cells, known, empty, overflowed)


def find_cells(run: Run) -> tuple[Tensor | None, Tensor]:
    """Score and cells (B, cells_h, cells_w) of a draft, or those that the run was given."""
    if run.finding is not None:
        drafts.skip(run)
        return run.finding
    draft = drafts.generate(run)  # 3.3.1, eq. 4 and 5
    found = verify.verify_draft(run, draft)  # 3.3.2, eq. 6 and 7
    if not run.trace.interrupted:
        run.finding = found
    return found


def count_empty(detected: Tensor) -> int:
    """Samples of a mask (B, cells_h, cells_w) without any cell."""
    return int((~detected.flatten(1).any(1)).sum())

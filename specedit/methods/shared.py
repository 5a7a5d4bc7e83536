"""What several methods need: a stage of plain Euler steps, and the outcome of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import MixedLayout
from ..method import groups as grouping
from ..method.adapter import LayoutGroup, Run
from ..method.cells import CellMasks
from ..method.denoise import euler_step
from ..method.masks import cells_of_mask
from ..method.sampler import Outcome
from ..method.schedule import Stage
from ..method_options import Method
from ..method_plan import MethodRun, PlannedStage, StepKind


def planned_regions(method: Method, steps: Sequence[StepKind], run: MethodRun, **more: Any) -> list[PlannedStage]:
    """The one stage of a method that computes edited tokens alone in some steps.

    Raises:
        ValueError: no mask says which these are.
    """
    if not run.masked:
        raise ValueError(
            f"method: {method.name!r} finds what is edited while it runs, so its cost is known beforehand with a mask "
            "alone; expected drafts=False, with edit_fraction or cells for the mask's"
        )
    return [PlannedStage("full", "fine", tuple(steps), **more)]


def start_fine(run: Run, stage: Stage) -> list[LayoutGroup]:
    """All samples in one group at full resolution, with the call's own noise and the model's own schedule."""
    state = run.state
    layout = MixedLayout.all_fine(state.grid, state.device)
    return [grouping.new_group(run, list(range(state.batch)), layout, state.noise, stage, stage.start)]


def run_stage(
    run: Run, name: str, groups: list[LayoutGroup], *, keep_clean: bool = False, watch: Callable[[], None] | None = None
) -> None:
    """Take every step of the groups' `sigmas`, or stop where the caller interrupts.

    keep_clean: the groups' clean predictions too, in `LayoutGroup.clean`. watch: called after every step.
    """

    def step(i: int) -> None:
        for group in groups:
            euler_step(run, group, i, keep_clean=keep_clean)

    run_steps(run, name, groups, step, watch)


def run_steps(
    run: Run, name: str, groups: list[LayoutGroup], step: Callable[[int], None], watch: Callable[[], None] | None = None
) -> None:
    """A stage whose steps are the method's own: call step(i) for every step of the groups' `sigmas`, or stop where the
    caller interrupts. watch: called after every step."""
    with run.trace.running(name) as running:
        running.start(run, groups)
        for i in range(len(groups[0].sigmas) - 1):
            if run.trace.interrupted:
                break
            step(i)
            run.trace.after_step(run, groups, i)
            if watch is not None:
                watch()


def outcome_of(
    run: Run, groups: list[LayoutGroup], edit_mask: Any = None, *, detected: Tensor | None = None,
    score: Tensor | None = None, refined: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """The outcome of a run that ends in `groups`.

    edit_mask: the caller's. detected: cells (B, cells_h, cells_w) bool that the method itself found to be edited; the
    caller's mask comes first. Without either, everything counts as edited. score: see `Outcome`. refined:
    cells (B, cells_h, cells_w) that were computed at full resolution before the others; None: what is edited.
    """
    state = run.state
    known = edit_mask is not None or detected is not None
    if edit_mask is not None:
        detected = cells_of_mask(edit_mask, state)
    elif detected is None:
        detected = torch.ones((state.batch, *state.grid.coarse().shape), dtype=torch.bool, device=state.device)
    cells = CellMasks.from_detected(run, detected, verified=known)
    cells = replace(cells, refined=cells.edited if refined is None else refined)  # no uniform coverage
    return Outcome(grouping.gather(groups, state), score, cells, known)

"""Rows of a plan: the forward calls that every stage of a run would make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FULL_EDIT_SHARE, SpecEditConfig
from ..forecast import ReferenceKVCache, full_steps
from ..forecast.kv_cache import LOCKED_RESET
from ..layout import MixedLayout, TokenGrid
from ..method.reference_selection import kept_tokens, measured_rows
from ..method.schedule import Stage, stage_start
from ..method.trace import ForwardCall, prefix_call, step_calls, with_fixed_reference
from ..method_plan import PlannedStage
from .forward import flops_of
from .tables import ModelCost


def expanded_cells(config: SpecEditConfig, rows: int, cols: int, edit_fraction: float) -> int:
    """Expected number of expanded cells on a rows x cols coarse grid.

    The edited cells, and of the unedited ones the share that uniform coverage (eq. 9) picks anyway. All of them where a
    run edits everything: nearly all are edited, or none was found and what is not found is kept.
    """
    cells = rows * cols
    if edit_fraction > FULL_EDIT_SHARE or (edit_fraction == 0 and config.preserves_unedited):
        return cells
    edited = edit_fraction * cells
    uniform = TokenGrid(rows, cols).coarse(config.uniform_stride).tokens / cells if config.uniform_stride else 0.0
    return round(edited + uniform * (cells - edited))


@dataclass(frozen=True)
class PlannedLayout:
    """How many tokens a sample has in a stage, and how many of its cells are expanded and locked."""

    tokens: int
    expanded: int
    locked: int

    @classmethod
    def estimated(cls, grid: TokenGrid, expanded: int) -> PlannedLayout:
        """So many cells expanded, which on a grid of odd sides have a mean number of tokens."""
        locked = grid.coarse().tokens - expanded
        return cls(locked + round(grid.tokens * expanded / grid.coarse().tokens), expanded, locked)

    @property
    def left_out(self) -> int:
        """Locked cells that may leave the target of a mixed sequence."""
        return self.locked if self.expanded else 0


def estimated_layouts(config: SpecEditConfig, grid: TokenGrid, edit_fraction: float | None) -> list[PlannedLayout]:
    """The mixed layout of one sample."""
    expanded = expanded_cells(config, *grid.coarse().shape, checked_fraction(edit_fraction))
    return [PlannedLayout.estimated(grid, expanded)]


def checked_fraction(edit_fraction: float | None) -> float:
    """`edit_fraction`; ValueError unless it is a number from 0 to 1."""
    if edit_fraction is None or not 0 <= edit_fraction <= 1:
        raise ValueError(f"edit_fraction: expected a number from 0 to 1, got {edit_fraction!r}")
    return edit_fraction


def given_layouts(grid: TokenGrid, cells: Tensor, edit_fraction: float | None) -> list[PlannedLayout]:
    """The mixed layout of every sample."""
    if edit_fraction is not None:
        raise ValueError(f"edit_fraction: expected None beside cells, got {edit_fraction!r}")
    if not isinstance(cells, Tensor):
        raise TypeError(f"cells: expected a bool tensor, got {type(cells).__name__}")
    shape = grid.coarse().shape
    if cells.dtype != torch.bool or cells.ndim not in (2, 3) or tuple(cells.shape[-2:]) != shape or not len(cells):
        expected = f"bool {shape} or (B, {shape[0]}, {shape[1]})"
        raise ValueError(f"cells: expected {expected}, got {cells.dtype} {tuple(cells.shape)}")
    masks = cells.reshape(-1, *shape)
    return [PlannedLayout(MixedLayout(grid, mask).tokens, int(mask.sum()), int((~mask).sum())) for mask in masks]


class PlannedRun:
    """Rows of a plan, stage by stage. `mixed`: each sample's layout in the mixed stage."""

    def __init__(self, config: SpecEditConfig, cost: ModelCost, grid: TokenGrid, mixed: list[PlannedLayout]):
        self.config, self.cost, self.grid = config, cost, grid
        cells = grid.coarse().tokens
        self.layouts = {
            "coarse": [PlannedLayout(cells, 0, cells)] * len(mixed), "mixed": mixed,
            "full": [PlannedLayout(grid.tokens, cells, 0)] * len(mixed),
        }  # fmt: skip
        self.ended: list[tuple[PlannedLayout, float] | None] = [None] * len(mixed)  # of the stage before
        self.prefixes = 0  # guidance passes whose text and references are computed

    def draft(self) -> dict[str, Any]:
        """The draft's row."""
        config, texts = self.config, self.cost.texts
        if config.draft_condition == "small":  # a picture smaller by draft_scale a side has as many fewer tokens
            vision = self.cost.vision_tokens
            texts = tuple(text - vision + -(-vision // config.draft_scale**2) for text in texts)
        tokens, samples = self.grid.coarse(config.draft_scale).tokens, len(self.ended)
        stage = Stage("draft", 1.0, 0.0, config.draft_steps)
        return self._row(stage, [(samples, texts, self._steps(stage, PlannedLayout(tokens, tokens, 0), stage.start))])

    def stage(self, stage: Stage, first: bool) -> dict[str, Any]:
        """The row of a stage of the main run."""
        groups: Counter[tuple[PlannedLayout, float]] = Counter()
        for row, layout in enumerate(self.layouts[stage.name]):
            before, start = self.ended[row], stage.start
            if before is not None:
                start = stage_start(stage, before[1], same_layout=before[0].expanded == layout.expanded)
            groups[layout, start] += 1
            self.ended[row] = layout, stage.end
        each = [
            (samples, self.cost.texts, self._steps(stage, layout, start, first))
            for (layout, start), samples in groups.items()
        ]
        return self._row(stage, each)

    def method_stage(self, stage: PlannedStage) -> dict[str, Any]:
        """The row of a stage of another method, whose layout for "mixed" is `mixed`."""
        layouts = self.layouts["full" if stage.layout == "fine" else stage.layout]
        counted = Counter(zip(layouts, self.layouts["mixed"], strict=True))
        each = [
            (samples, self.cost.texts, self._method_steps(stage, layout, edited))
            for (layout, edited), samples in counted.items()
        ]
        return self._row(Stage(stage.name, 1.0, 0.0, len(stage.steps)), each)

    def _method_steps(self, stage: PlannedStage, layout: PlannedLayout, edited: PlannedLayout) -> list[PlannedStep]:
        """edited: with the edited cells expanded, whose fine tokens are those of steps over some."""
        kinds: Sequence[str] = stage.steps
        if stage.needs_locked and not edited.locked:
            kinds = ["all"] * len(kinds)
        fine = edited.tokens - edited.locked
        passes, target = self.cost.passes, layout.tokens
        beside = self.grid.tokens if self.cost.fixed_prefix else target
        steps = []
        for i, kind in enumerate(kinds):
            some = kind == "some"
            steps.append(PlannedStep(passes, kind != "none", some, fine if some else None, target, beside, 0, i == 0))
        return steps

    def _row(self, stage: Stage, groups: list[tuple[int, tuple[float, ...], list[PlannedStep]]]) -> dict[str, Any]:
        calls: Counter[ForwardCall] = Counter()
        for samples, texts, steps in groups:
            for step in steps:
                calls.update(self._calls(stage, samples, texts, step))
        listed = [dataclasses.replace(call, count=count) for call, count in calls.items()]
        steps = groups[0][2]
        total = sum(samples for samples, *_ in groups)
        lengths = [(samples, texts[0] + steps[0].target + steps[0].beside) for samples, texts, steps in groups]
        return {
            "name": stage.name, "steps": stage.steps, "cached": sum(not step.full for step in steps),
            "reused": sum(step.kept for step in steps),
            "tokens": sum(n * length for n, length in lengths) / total if total > 1 else lengths[0][1],
            "flops": flops_of(listed, self.cost.config), "calls": listed, "groups": len(groups),
            "passes": sum(step.forward_passes(self.cost.packs) for _, _, steps in groups for step in steps),
        }  # fmt: skip

    def _steps(self, stage: Stage, layout: PlannedLayout, start: float, first: bool = False) -> list[PlannedStep]:
        """How every step of a stage is computed whose target has `layout`."""
        config = self.config
        options = None if stage.name == "draft" else config.forecast_options
        pattern = [True] * stage.steps
        if options is not None:
            pattern = full_steps(stage.steps, options.interval, options.warmup(first))
        fine = layout.tokens - layout.left_out
        target = fine if config.locked == "reference" else layout.tokens
        every = LOCKED_RESET if config.locked == "cached" and layout.left_out else config.reference_refresh
        store = None if every is None else ReferenceKVCache(every)
        steps, since = [], 0
        for i, (full, passes) in enumerate(zip(pattern, self._passes(stage, layout.tokens, start), strict=True)):
            since = 0 if full else since + 1
            kept = full and store is not None and store.calls(i, passes)[0].target
            fresh = fine if kept and every != config.reference_refresh else None
            if not full and options is not None and options.token_wise and options.recomputes(since):
                fresh = options.fresh_tokens(target)
            beside, measured = self._reference(stage, i, layout.tokens, target)
            steps.append(PlannedStep(passes, full, kept, fresh, target, beside, measured, first=i == 0))
        return steps

    def _reference(self, stage: Stage, i: int, tokens: int, target: int) -> tuple[int, int]:
        """Reference tokens of step `i`, and target tokens whose attention it measures."""
        if self.cost.fixed_prefix:
            return self.grid.tokens, 0
        keep = self.config.reference_keep
        if keep is None or keep == 1 or stage.steps == 1 or stage.name == "draft":
            return tokens, 0
        return (tokens, measured_rows(target)) if i == 0 else (kept_tokens(keep, tokens), 0)

    def _passes(self, stage: Stage, own: int, start: float) -> list[int]:
        """Guidance passes of every step of a stage."""
        if self.config.guidance_range is None:
            return [self.cost.passes] * stage.steps
        low, high = self.config.guidance_range
        sigmas = self.cost.stage_sigmas(own, start, stage.end, stage.steps).tolist()
        return [self.cost.passes if low <= sigma <= high else 1 for sigma in sigmas[:-1]]

    def _calls(self, stage: Stage, samples: int, texts: tuple[float, ...], step: PlannedStep) -> list[ForwardCall]:
        if not step.full and step.fresh is None:
            options = self.config.forecast_options
            operations = options.operations(step.target * self.cost.channels) if options else 0.0
            forecast = ForwardCall(stage.name, 0, samples=samples, forecast=operations)
            return [forecast] * step.passes if operations else []
        if self.cost.fixed_prefix:
            return self._target_calls(stage, samples, texts, step)
        calls = step_calls(
            stage.name, texts[: step.passes], step.target, step.beside, samples=samples,
            trims=self.config.attention != "stock", fresh=step.fresh, alone=step.kept and step.fresh is None,
            measured=step.measured,
        )  # fmt: skip
        return with_fixed_reference(calls, step.beside, step.first) if self.cost.fixed_reference else calls

    def _target_calls(
        self, stage: Stage, samples: int, texts: tuple[float, ...], step: PlannedStep
    ) -> list[ForwardCall]:
        """A step over the target's tokens, and what its passes are the first to need of text and references."""
        calls = step_calls(
            stage.name, texts[: step.passes], step.target, step.beside, samples=samples, trims=False, fresh=step.fresh,
            alone=True,
        )  # fmt: skip
        new = texts[self.prefixes : step.passes]
        self.prefixes = max(self.prefixes, step.passes)
        return calls + [prefix_call(stage.name, text, step.beside, len(self.ended)) for text in new]


@dataclass(frozen=True)
class PlannedStep:
    """One step: guidance passes, whether it is computed fully, over some tokens with those of the others kept, and over
    the text and how many (`fresh`); tokens of the target and of the reference, how many are measured, and whether it is
    the stage's first."""

    passes: int
    full: bool
    kept: bool
    fresh: int | None
    target: int
    beside: int
    measured: int
    first: bool

    def forward_passes(self, packs: bool) -> int:
        """Of the transformer. packs: whether guidance passes are one."""
        return (1 if packs else self.passes) if self.full or self.fresh is not None else 0

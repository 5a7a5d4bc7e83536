"""Bottleneck Sampling: full resolution, half resolution, full resolution, with noise put back at both switches.

Tian et al., "Training-free Diffusion Acceleration with Bottleneck Sampling", arXiv 2503.18940. Its public code is
github.com/tyfeld/Bottleneck-Sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..checks import number, sequence
from ..layout import MixedLayout, mean_pixels
from ..method import draft as drafts
from ..method.adapter import LayoutGroup, Run
from ..method.groups import group_at, start_tokens
from ..method.sampler import Outcome
from ..method.schedule import SAME_SIGMA
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, all_steps
from . import resolution
from .shared import outcome_of, run_stage

STAGES = ("full", "coarse", "final")  # names differ, because a report counts operations by name
FINE_TIMES = 1000  # at which the model's schedule is read


@register_method
@dataclass(frozen=True)
class Bottleneck(Method):
    """Three stages: all tokens fine, all coarse, all fine.

    Each denoises to the end on a schedule of its own: the model's, shifted for the stage's number of tokens. The next
    one takes the clean result at its own resolution and puts noise back, x = (1 - s) x0 + s n with fresh n, where s is
    its schedule at the uniform time `restarts`. Downwards, four latent pixels are averaged; upwards, they are
    interpolated bilinearly.

    The order of resolutions, the noise and the shifts are the paper's; the constants come from papers that compare with
    it. The settings "5x" and "7x" have the steps that the authors of RALU gave it on FLUX.1 (arXiv 2507.08422, appendix
    B.2.1: 4, 12, 5 and 3, 8, 4). Their table 1 counts fewer operations than so many steps take; those of 10 and 6
    coarse ones, and of the last 2, fit it. The others are taken to be skipped, by restarts at 10/12, 6/8, 2/5 and 2/4.
    The setting "3x" costs what SpecEdit's table reports for 30 evaluations of FLUX.1-Kontext (arXiv 2605.02152). The
    reference has the target's layout.

    Args:
        steps: model evaluations of the three stages.
        restarts: uniform times in (0, 1) to which the noise of the second and the third stage is put back.
    """

    steps: tuple[int, int, int] = (4, 10, 2)
    restarts: tuple[float, float] = (10 / 12, 2 / 5)

    name = "bottleneck"
    published: ClassVar = {
        "3x": dict(steps=(8, 18, 4), restarts=(18 / 22, 4 / 8)),
        "5x": {},
        "7x": dict(steps=(3, 6, 2), restarts=(6 / 8, 2 / 4)),
    }

    def validate(self) -> None:
        self.set("steps", resolution.check_stage_steps("steps", self.steps))
        expected = "two numbers above 0 and below 1"
        given = sequence("restarts", self.restarts, 2, expected)
        first, second = (number("restarts", time, expected) for time in given)
        if not (0 < first < 1 and 0 < second < 1):
            raise ValueError(f"restarts: expected {expected}, got {self.restarts!r}")
        self.set("restarts", (first, second))

    @property
    def nfe(self) -> int:
        return sum(self.steps)

    def with_steps(self, n: int) -> Bottleneck:
        return replace(self, steps=resolution.scale_stage_steps(self, self.steps, n))

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        layouts: list[Literal["fine", "coarse"]] = ["fine", "coarse", "fine"]
        return [all_steps(*stage) for stage in zip(STAGES, layouts, self.steps, strict=True)]

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        state = run.state
        resolution.check_size(self, state)
        fine, coarse = (make(state.grid, state.device) for make in (MixedLayout.all_fine, MixedLayout.all_coarse))
        groups: list[LayoutGroup] = []
        for i, layout in enumerate((fine, coarse, fine)):
            if groups and run.trace.interrupted:
                break
            tokens, sigmas = state.noise, self.sigmas(run, layout, i)
            if groups:
                noise = start_tokens(state.draw(state.grid.tokens), layout)
                tokens = (1 - sigmas[0]) * resized(run, groups[0], layout) + sigmas[0] * noise
            groups = [group_at(run, list(range(state.batch)), layout, tokens, sigmas)]
            run_stage(run, STAGES[i], groups)
        return outcome_of(run, groups, edit_mask)

    def sigmas(self, run: Run, layout: MixedLayout, stage: int) -> list[float]:
        """Noise levels of a stage, 0 to 2: the model's schedule for the layout's tokens, from the restart to 0."""

        def schedule(start: float, steps: int) -> list[float]:
            found: list[float] = run.adapter.sigmas(run.pipe, layout.tokens, start, 0.0, steps).tolist()
            return found

        if stage == 0:
            return schedule(1.0, self.steps[0])
        before = round(FINE_TIMES * (1 - self.restarts[stage - 1]))
        start = schedule(1.0, FINE_TIMES)[min(before, FINE_TIMES - 1)]
        return schedule(max(start, SAME_SIGMA), self.steps[stage])


def resized(run: Run, group: LayoutGroup, layout: MixedLayout) -> Tensor:
    """The clean tokens (B, layout.tokens, C) of all samples, at the other of the two resolutions."""
    grid = run.state.grid
    if layout.is_coarse:
        return mean_pixels(group.tokens, grid)
    return drafts.upsample(group.tokens, grid.coarse(), 2, grid)

"""Fewer steps of the stock sampler: the strongest peer on easy edits, and what every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..checks import integer
from ..method.adapter import Run
from ..method.sampler import Outcome
from ..method.schedule import Stage
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, all_steps
from .shared import outcome_of, run_stage, start_fine


@register_method
@dataclass(frozen=True)
class Steps(Method):
    """The stock sampler with `count` steps at full resolution.

    Args:
        count: model evaluations, at least 1.
    """

    count: int = 28

    name = "steps"
    published: ClassVar = {str(n): {"count": n} for n in (50, 28, 10, 8, 4, 2, 1)}

    def validate(self) -> None:
        self.set("count", integer("count", self.count, 1))

    @property
    def nfe(self) -> int:
        return self.count

    def with_steps(self, n: int) -> Steps:
        return replace(self, count=n)

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        return [all_steps("full", "fine", self.count)]

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        groups = start_fine(run, Stage("full", 1.0, 0.0, self.count))
        run_stage(run, "full", groups)
        return outcome_of(run, groups, edit_mask)

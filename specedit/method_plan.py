"""How a method says beforehand what it will compute, for `specedit.flops.plan`. Pure data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# A step over all tokens, over those of edited cells with keys and values of the others kept, or over none.
StepKind = Literal["all", "some", "none"]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a method: its name in the report, the tokens of target and reference, and every step.

    layout: "coarse", "mixed" with the `share` of the cells split, at least one, or "fine". needs_locked: steps over
    some tokens are over all where no cell is locked.
    """

    name: str
    layout: Literal["coarse", "mixed", "fine"]
    steps: tuple[StepKind, ...]
    share: float = 1.0
    needs_locked: bool = False


@dataclass(frozen=True)
class MethodRun:
    """What a method may ask of the run that it plans.

    adapter: has the `name` of the model's adapter, and whether it `skips_tokens` and `skips_blocks`. grid: the
    output's `TokenGrid`. masked: whether a mask says what is edited. sigmas: (tokens, steps) to the noise levels of the
    model's whole schedule.
    """

    adapter: Any
    grid: Any
    masked: bool
    sigmas: Callable[[int, int], list[float]]


def all_steps(name: str, layout: Literal["coarse", "mixed", "fine"], count: int, share: float = 1.0) -> PlannedStage:
    """A stage whose steps compute all tokens."""
    steps: list[StepKind] = ["all"] * count
    return PlannedStage(name, layout, tuple(steps), share)

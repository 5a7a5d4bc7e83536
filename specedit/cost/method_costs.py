"""The stages of another method's run, before it is run."""

from __future__ import annotations

from types import SimpleNamespace

from ..layout import TokenGrid
from ..method_options import Method
from ..method_plan import MethodRun, PlannedStage
from .planned_run import PlannedLayout, checked_fraction
from .tables import ModelCost


def planned_stages(method: Method, cost: ModelCost, grid: TokenGrid, *, masked: bool) -> list[PlannedStage]:
    """What a method's run will compute. masked: whether a mask says what is edited.

    Raises:
        ValueError: the method does not run on the model, or what it computes is not known beforehand.
    """
    tokens = not cost.fixed_reference
    blocks = tokens and not cost.fixed_prefix
    adapter = SimpleNamespace(name=cost.adapter or "the model", skips_tokens=tokens, skips_blocks=blocks)
    if (reason := method.refusal(adapter)) is not None:
        raise ValueError(f"method: expected another one, {reason}, got {method.name!r}")

    def sigmas(tokens: int, steps: int) -> list[float]:
        found: list[float] = cost.stage_sigmas(tokens, 1.0, 0.0, steps).tolist()
        return found

    return method.planned_stages(MethodRun(adapter, grid, masked, sigmas))


def planned_layout(grid: TokenGrid, stages: list[PlannedStage], edit_fraction: float | None) -> PlannedLayout:
    """A sample's layout where the stage called mixed splits its share of the cells, or with the edited ones expanded
    where steps compute these alone; with all of them of other methods.

    Raises:
        ValueError: `edit_fraction` is needed, and is no number from 0 to 1.
    """
    cells = grid.coarse().tokens
    for stage in stages:
        if stage.layout == "mixed":
            return PlannedLayout.estimated(grid, max(1, int(stage.share * cells)))
        if "some" in stage.steps:
            return PlannedLayout.estimated(grid, round(checked_fraction(edit_fraction) * cells))
    return PlannedLayout.estimated(grid, cells)

"""FLUX.2's schedule, whose shift depends on the number of steps too."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2 import pipeline_flux2 as stock
from torch import Tensor

from ...method.schedule import shift_factor, stage_sigmas

MOST_STEPS = 200  # the rule is a line through 10 and 200 steps
HALVINGS = 40


def flux2_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, start: float, end: float, steps: int
) -> Tensor:
    """`stage_sigmas` with the shift of a whole schedule that takes `steps` between `start` and `end`.

    So a part of a schedule has the sigmas that it has within the whole one, and all of it equals the stock pipeline's.
    """
    mu = None
    if scheduler.config.get("use_dynamic_shifting"):
        mu = stock.compute_empirical_mu(tokens, whole_steps(scheduler, tokens, start, end, steps))
    return stage_sigmas(scheduler, tokens, start, end, steps, mu)


def whole_steps(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, start: float, end: float, steps: int) -> float:
    """Steps from 1 to 0 of the schedule that takes `steps` of them between `start` and `end`; at most 200, or `steps`.

    A schedule is uniform before the shift, so of n steps it takes n * (t(start) - t(end)) there. More steps mean less
    shift, which moves t: hence the search.
    """

    def taken(whole: float) -> float:
        a = shift_factor(scheduler, tokens, stock.compute_empirical_mu(tokens, whole))
        first, last = (sigma / (a + (1 - a) * sigma) for sigma in (start, end))
        return whole * (first - last)

    few, many = float(steps), float(max(steps, MOST_STEPS))
    if taken(few) >= steps:
        return few
    for _ in range(HALVINGS):
        middle = (few + many) / 2
        few, many = (few, middle) if taken(middle) >= steps else (middle, many)
    return many

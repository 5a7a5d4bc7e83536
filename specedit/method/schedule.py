"""Which sigmas each stage runs through.

A stage is the model's own schedule restricted to an interval of sigma. Flow-match schedulers shift a uniform time t by
sigma = a*t / (1 + (a-1)*t), where a grows with the number of image tokens (Esser et al., "Scaling Rectified Flow
Transformers", eq. 23). The map is inverted at both ends of the interval and the uniform steps lie in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..config import SpecEditConfig
from ..field_checks import taken_steps

SAME_SIGMA = 1e-6  # a stage's last noise level is float32's, its boundary is not
HALVINGS = 50


@dataclass(frozen=True)
class Stage:
    """`steps` model evaluations from sigma `start` down to sigma `end`. `name`: "coarse", "mixed" or "full"."""

    name: str
    start: float
    end: float
    steps: int


def expanded_sigma(sigma: float) -> float:
    """The noise level after a coarse state at `sigma` in [0, 1] has been expanded: 2s / (1+s).

    Expansion divides by (1+s) so that the four children carry white noise: signal (1-s)/(1+s), noise 2s/(1+s), which
    sum to one again.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma: expected a number from 0 to 1, got {sigma!r}")
    return 2 * sigma / (1 + sigma)


def contracted_sigma(sigma: float) -> float:
    """The noise level of a coarse state that carries as much noise as a fine one at `sigma`: s / (2-s).

    The inverse of `expanded_sigma`: a block's mean times 2 / (2-s) has signal (2-2s)/(2-s) and noise s/(2-s).
    """
    return sigma / (2 - sigma)


def stages(config: SpecEditConfig, start: float = 1.0) -> list[Stage]:
    """The stages of the main run that have steps, in order, from `start` to sigma 0. The draft is not among them.

    coarse [1, s1], mixed [s1', s2], full [s2', 0] with s' = 2s/(1+s), because tokens are expanded between stages.
    A stage without steps leaves its interval to the next one, and the last one with steps ends at 0. With
    restore="reference" the steps of the full stage are taken on the mixed sequence. With restore="pixels" all but one
    are, and what runs before that one ends at 0 too, as it starts from pixels. Steps (0, 0, n) are the stock schedule.

    start: the noise level of fine tokens at which the run begins; below 1 where it begins with a noised picture. A
    coarse stage begins at the level of as much noise, s/(2-s). A stage that ends above the start leaves its steps to
    the next one.
    """
    coarse, mixed, full = taken_steps(config.steps, config.restore)
    plan = [("coarse", coarse, config.boundaries[0]), ("mixed", mixed, config.boundaries[1]), ("full", full, 0.0)]
    plan = [stage for stage in plan if stage[1]]
    result: list[Stage] = []
    clean = 2 if config.restore == "pixels" else 1  # how many of the last stages end at 0
    begin, left = start, 0  # left: steps of stages that end above the start
    for i, (name, steps, boundary) in enumerate(plan):
        end = 0.0 if i >= len(plan) - clean else boundary
        if not result and end and start <= expanded_sigma(end):
            left += steps
            continue
        if not result and name == "coarse":
            begin = contracted_sigma(start)
        result.append(Stage(name, begin, end, left + steps))
        begin, left = expanded_sigma(end) or min(config.pixel_restore_sigma, start), 0
    return result


def stage_start(stage: Stage, ended: float, *, same_layout: bool) -> float:
    """The sigma at which a stage starts, whose samples ended the stage before at `ended`.

    An unchanged layout continues at its noise level, unless the stage ends above that: then it is renoised.
    """
    return ended if same_layout and ended > stage.end + SAME_SIGMA else stage.start


def supported(scheduler: Any) -> str | None:
    """None when `stage_sigmas` reproduces this scheduler, else the reason why not (one phrase, for a warning)."""
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        return f"the scheduler is {type(scheduler).__name__}, not FlowMatchEulerDiscreteScheduler"
    for option in (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "stochastic_sampling",
        "invert_sigmas",
    ):
        if scheduler.config.get(option):
            return f"the scheduler sets {option}"
    return None


def shift_factor(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, mu: float | None = None) -> float:
    """a of sigma = a*t / (1 + (a-1)*t) for an image of `tokens` tokens.

    Dynamic shifting draws mu as a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as
    the pipelines' calculate_shift does, unless it is given; a is exp(mu) for the exponential type and mu for the linear
    one. Otherwise a is the scheduler's static shift.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(scheduler.shift)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    if mu is None:
        mu = base + (tokens - low) * (top - base) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def stage_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, start: float, end: float, steps: int,
    mu: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sigmas of one stage: the scheduler's own time shift, restricted to [end, start].

    With start=1 and end=0 they equal those of `scheduler.set_timesteps(sigmas=np.linspace(1, 1/steps, steps), mu=...)`.
    Where the stage ends at 0 and the scheduler has a `shift_terminal`, the sigmas are stretched as the scheduler does:
    the last one before 0 becomes shift_terminal and `start` stays. A single step, or a start below shift_terminal, has
    nothing to stretch. The scheduler itself is not changed.

    Args:
        tokens: image tokens of the stage that the shift depends on (the target's, without text and reference).
        start, end: sigmas with 0 <= end < start <= 1.
        steps: number of model evaluations, at least 1.
        mu: of a dynamic shift that the pipeline computes by a rule of its own; None for the scheduler's own line.

    Returns:
        float32 CPU tensor (steps + 1,), strictly decreasing, from `start` to `end`.

    Raises:
        ValueError: arguments out of range, or a scheduler for which `supported` gives a reason.
    """
    reason = supported(scheduler)
    if reason:
        raise ValueError(f"scheduler: expected a plain flow-match Euler scheduler, but {reason}")
    if not 0 <= end < start <= 1:
        raise ValueError(f"start, end: expected 0 <= end < start <= 1, got start={start!r}, end={end!r}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps!r}")
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens!r}")
    a = shift_factor(scheduler, tokens, mu)
    if not a > 0:
        raise ValueError(f"scheduler: expected a positive time shift, got {a!r} for {tokens} tokens")

    sigmas = shifted_sigmas(a, start, end, steps)
    terminal = scheduler.config.get("shift_terminal")
    if terminal and end == 0 and steps > 1 and start > terminal:
        scale = (start - terminal) / (start - sigmas[-2])
        sigmas = start - (start - sigmas) * scale
    sigmas[0], sigmas[-1] = start, end  # rounding in the two maps must not move the ends
    return sigmas.float()


def stretched_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, start: float, end: float, steps: int
) -> torch.Tensor:
    """`stage_sigmas`, where a stage that ends at 0 is the end of a whole schedule with a `shift_terminal`.

    So a run that begins at one of the scheduler's sigmas goes through all that follow. A schedule whose steps are t/m
    apart before the shift f is stretched to 1 - (1 - f) (1 - terminal) / (1 - f(t/m)): t is searched for.
    """
    sigmas, terminal = stage_sigmas(scheduler, tokens, start, end, steps), scheduler.config.get("shift_terminal")
    if not terminal or end > 0 or steps == 1 or start <= terminal or start == 1:
        return sigmas
    a = shift_factor(scheduler, tokens)

    def stretched(first: float) -> torch.Tensor:
        shifted = shifted_sigmas(a, a * first / (1 + (a - 1) * first), 0.0, steps)
        scale: float = (1 - terminal) / (1 - shifted[-2].item())
        return 1 - scale * (1 - shifted)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if stretched(middle)[0] >= start else (middle, high)
    sigmas = stretched(high)
    sigmas[0], sigmas[-1] = start, 0.0
    return sigmas.float()


def shifted_sigmas(a: float, start: float, end: float, steps: int) -> torch.Tensor:
    """(steps + 1,) float64: uniform times of the shift sigma = a*t / (1 + (a-1)*t), from `start` down to `end`."""
    first, last = (sigma / (a + (1 - a) * sigma) for sigma in (start, end))
    t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return a * t / (1 + (a - 1) * t)

"""The schedule of pipelines that bring their own sigmas, as Turbo does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...method.schedule import shift_factor


def own_sigmas(pipe: Any) -> Sequence[float] | None:
    """The sigmas of every step in a pipeline's configuration, before the scheduler's shift; None without any."""
    sigmas: Sequence[float] | None = pipe.config.get("sample_sigmas")
    return sigmas


def why_unusable(sigmas: Sequence[float]) -> str | None:
    """Why sigmas are no schedule (one phrase), or None."""
    values = [*sigmas, 0.0]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if len(sigmas) and falling and sigmas[0] <= 1:
        return None
    return "its sample_sigmas do not fall from at most 1 to above 0"


def resampled(scheduler: Any, own: Sequence[float], tokens: int, start: float, end: float, steps: int) -> Tensor:
    """Sigmas (steps + 1,) float32 of a stage, on the line through the shifted `own` ones and 0.

    Steps are uniform in the number of the own step. So the whole schedule in as many steps is stock's, and a part has
    the sigmas that it has within the whole. A start above the first own sigma begins at that one.
    """
    mu = None
    if scheduler.config.get("use_dynamic_shifting"):
        a = shift_factor(scheduler, tokens)
        mu = float(np.log(a)) if scheduler.config.get("time_shift_type", "exponential") == "exponential" else a
    stock = copy.copy(scheduler)  # `set_timesteps` replaces what it sets
    stock.set_timesteps(sigmas=list(own), mu=mu)
    levels = stock.sigmas.double().numpy()
    numbers = np.arange(len(levels), dtype=np.float64)
    first, last = np.interp([-start, -end], -levels, numbers)  # which np.interp wants to rise
    sigmas = np.interp(np.linspace(first, last, steps + 1), numbers, levels)
    sigmas[0], sigmas[-1] = min(start, levels[0]), end
    if end >= levels[0]:  # before the own schedule begins
        sigmas = np.linspace(start, end, steps + 1)
    return torch.from_numpy(sigmas).float()

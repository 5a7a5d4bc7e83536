"""HiCache (arXiv 2508.16984): the series of TaylorSeer in scaled Hermite polynomials."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import share
from ..forecast_options import ForecastContext, SeriesOptions, register_forecast
from .base import Forecaster
from .taylor import TaylorForecaster

SCALE = 0.5  # default "hicache_scale_factor" of the public code; the paper explores 0.5 to 0.75


def hermite(x: float, count: int) -> list[float]:
    """Physicists' Hermite polynomials H_0..H_{count-1} at x: H_{n+1} = 2x H_n - 2n H_{n-1}."""
    values = [1.0, 2.0 * x]
    for n in range(1, count - 1):
        values.append(2 * x * values[n] - 2 * n * values[n - 1])
    return values[:count]


def hermite_coefficients(x: float, count: int, scale: float) -> list[float]:
    """s^i H_i(s x) / i!: dual scaling, once inside the argument and once on the value."""
    return [scale**i * h / math.factorial(i) for i, h in enumerate(hermite(scale * x, count))]


class HermiteForecaster(TaylorForecaster):
    """F(x) = sum_{i<=m} D_i s^i H_i(s x) / i!, with x >= 0 the steps since the last full one and s the scale.

    Exact for Hermite expansions with the coefficients D_i. Paper and public code (yiming-l21 and fenglang918, HiCache)
    agree on the formula; the paper counts time downwards and the code steps upwards, and the code is followed. Note
    that even H_i do not vanish at x = 0: at second order the forecast starts off by -s^2 D_2, as published.
    """

    def __init__(self, interval: int, *, order: int = 2, scale: float = SCALE, **more):
        self.scale = share("scale", scale)
        super().__init__(interval, order=order, **more)

    def coefficients(self, step: int, sigma: float | None = None) -> list[float]:
        return hermite_coefficients(step - self.last, len(self.differences.steps), self.scale)


@register_forecast
@dataclass(frozen=True)
class Hermite(SeriesOptions):
    """HiCache.

    Args:
        scale: s of the formula, above 0, at most 1.
    """

    scale: float = SCALE

    name = "hermite"

    def validate(self) -> None:
        self.set("scale", share("scale", self.scale))

    def make(self, context: ForecastContext) -> Forecaster:
        return HermiteForecaster(
            self.interval, order=self.order, scale=self.scale, warmup=context.warmup, backend=context.backend
        )

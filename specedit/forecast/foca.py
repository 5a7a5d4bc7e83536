"""FoCa (arXiv 2508.16211): forecast, then calibrate; the feature as the solution of an ODE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..forecast_options import ForecastContext, ForecastOptions, register_forecast
from .base import Forecaster


class FoCaForecaster(Forecaster):
    """A BDF2 predictor and a Heun corrector, one step at a time (h = 1) from the two latest values.

    F' = F_k - F_{k-1}                                    latest slope, computed or forecast values alike
    P = 4/3 F_k - 1/3 F_{k-1} + 2/3 F'                    eq. 7, the explicit BDF2 predictor
    F_{k+1} = F_k + 1/2 [G + (P - F_k)]                   eq. 8, Heun, with G the slope of the last two full steps

    The paper has no code. Where eq. 8 leaves the slope at k+1 open, P - F_k is taken: the slope by eq. 6 itself would
    give back F', and the predictor would cancel. Public re-implementations differ: one averages F_k and P, another
    predicts every step from the last full one; neither is exact for F' = const with unequal gaps, this one is.
    """

    history = 2

    def reset(self) -> None:
        super().reset()
        self.values: list[tuple[int, Tensor]] = []  # latest first, at most two
        self.full: tuple[int, Tensor] | None = None
        self.slope: Tensor | None = None  # G

    def tensors(self) -> list[Tensor]:
        held = [value for _, value in self.values]
        held += [t for t in (self.full and self.full[1], self.slope) if t is not None]
        return list({t.data_ptr(): t for t in held}.values())

    def _observe(self, step, feature, sigma) -> None:
        if self.full is not None:
            self.slope = (feature - self.full[1]) / (step - self.full[0])
        self.full = (step, feature)
        self._push(step, feature)

    def _predict(self, step, sigma) -> Tensor:
        (at, _), *_ = self.values
        for k in range(at + 1, step + 1):  # one step, unless some were skipped
            (now, value), (before, previous) = self.values
            slope = (value - previous) / (now - before)
            # 4/3 F_k - 1/3 F_{k-1} where F_{k-1} lies one step back
            forecast = 4 / 3 * value - 1 / 3 * (value - slope) + 2 / 3 * slope
            self._push(k, torch.add(value, self.slope + (forecast - value), alpha=0.5))
        return self.values[0][1]

    def _push(self, step: int, value: Tensor) -> None:
        self.values = [(step, value), *self.values[:1]]


@register_forecast
@dataclass(frozen=True)
class FoCa(ForecastOptions):
    """FoCa: a predictor and a corrector for the feature's ODE."""

    name = "foca"

    @property
    def history(self) -> int:
        return FoCaForecaster.history

    def make(self, context: ForecastContext) -> Forecaster:
        return FoCaForecaster(self.interval, warmup=context.warmup, backend=context.backend)

    def operations(self, numbers: int) -> float:
        return 2.0 * 3 * numbers

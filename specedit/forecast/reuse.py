"""FORA (arXiv 2407.01425): a cached step takes the feature of the last full step as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..forecast_options import ForecastContext, ForecastOptions, register_forecast
from .base import Forecaster


class ReuseForecaster(Forecaster):
    """F(x) = F(0). Exact for constants.

    Paper and public code (prathebaselva/FORA) agree; they keep the outputs of attention and MLP, here it is the
    model's output (see `base`).
    """

    def reset(self) -> None:
        super().reset()
        self.feature: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [] if self.feature is None else [self.feature]

    def _observe(self, step, feature, sigma) -> None:
        self.feature = feature

    def _predict(self, step, sigma) -> Tensor:
        return self.feature


@register_forecast
@dataclass(frozen=True)
class Reuse(ForecastOptions):
    """FORA: the last full step's output as it is."""

    name = "reuse"

    def make(self, context: ForecastContext) -> Forecaster:
        return ReuseForecaster(self.interval, warmup=context.warmup, backend=context.backend)

    def operations(self, numbers: int) -> float:
        return 0.0

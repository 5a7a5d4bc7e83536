"""TaylorSeer (arXiv 2503.06923): a Taylor series whose derivatives are finite differences of full steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..forecast_options import ForecastContext, SeriesOptions, register_forecast
from .base import Differences, Forecaster


def taylor_coefficients(x: float, count: int) -> list[float]:
    """x^i / i!"""
    return [x**i / math.factorial(i) for i in range(count)]


def newton_coefficients(step: int, nodes: list[int]) -> list[float]:
    """prod_{j<i} (step - nodes[j]), the basis of Newton's interpolation at `nodes`."""
    out = [1.0]
    for node in nodes[:-1]:
        out.append(out[-1] * (step - node))
    return out


def check_basis(basis: object) -> None:
    """ValueError unless `basis` is one of the two."""
    if basis not in ("taylor", "newton"):
        raise ValueError(f"basis: expected 'taylor' or 'newton', got {basis!r}")


class TaylorForecaster(Forecaster):
    """F(x) = sum_{i<=m} D_i x^i / i!, with x the steps since the last full one.

    basis="taylor" is paper and public code (Shenyi-Z/TaylorSeer) alike: backward differences stand for derivatives, so
    it is exact for polynomials up to degree 1, and at higher orders it damps what an exact polynomial would amplify.
    The code differs from the paper where gaps differ (after the first full steps): it divides differences of every
    order by the last gap, and the code is followed. basis="newton" evaluates the interpolating polynomial itself with
    divided differences: exact for every polynomial of degree `order`, whatever the gaps.
    """

    def __init__(self, interval: int, *, order: int = 2, basis: str = "taylor", **more):
        check_basis(basis)
        self.order, self.basis, self.history = order, basis, order + 1
        super().__init__(interval, **more)

    def reset(self) -> None:
        super().reset()
        self.differences = Differences(self.order, divided=self.basis == "newton")

    def tensors(self) -> list[Tensor]:
        return [] if self.differences.stack is None else [self.differences.stack]

    def _observe(self, step, feature, sigma) -> None:
        self.differences.observe(step, feature)

    def coefficients(self, step: int, sigma: float | None = None) -> list[float]:
        nodes = self.differences.steps
        if self.basis == "newton":
            return newton_coefficients(step, nodes)
        return taylor_coefficients(step - self.last, len(nodes))

    def _predict(self, step, sigma) -> Tensor:
        return self.differences.evaluate(self.coefficients(step, sigma), self.backend)


@register_forecast
@dataclass(frozen=True)
class Taylor(SeriesOptions):
    """TaylorSeer.

    Args:
        basis: "taylor", as published, or "newton", the interpolating polynomial. They are equal at order 1.
    """

    basis: str = "taylor"

    name = "taylor"

    def validate(self) -> None:
        check_basis(self.basis)
        if self.basis == "newton" and self.order == 1:
            raise ValueError("basis: expected 'taylor' with order=1, where both are equal, got 'newton'")

    def make(self, context: ForecastContext) -> Forecaster:
        return TaylorForecaster(
            self.interval, order=self.order, basis=self.basis, warmup=context.warmup, backend=context.backend
        )

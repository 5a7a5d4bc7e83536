"""FreqCa (arXiv 2510.08669): the low band of the feature is reused, the high band is forecast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import share
from ..forecast_options import ForecastContext, SeriesOptions, register_forecast
from ..layout import MixedLayout
from .base import Differences, Forecaster
from .hermite import hermite_coefficients

CUTOFF = 0.1  # of the largest radial frequency
SCALE = 0.71  # of the high band's Hermite forecast


def cosine_matrix(n: int, device: torch.device) -> Tensor:
    """(n, n) float32 orthonormal DCT-II: rows are frequencies."""
    k, i = (torch.arange(n, device=device, dtype=torch.float64)[:, None], torch.arange(n, device=device) + 0.5)
    matrix = torch.cos(math.pi / n * k * i) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


class LowPass:
    """Keeps the DCT frequencies of a token grid within CUTOFF of the largest radius: (b, N, C) to (b, N, C)."""

    def __init__(self, layout: MixedLayout, cutoff: float = CUTOFF):
        self.layout, self.cutoff = layout, cutoff
        self.matrices: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        grid = self.layout.grid.coarse() if self.layout.is_coarse else self.layout.grid
        if self.matrices is None:
            rows, columns = (cosine_matrix(n, tokens.device) for n in grid.shape)
            y, x = (torch.arange(n, device=tokens.device, dtype=torch.float32) for n in grid.shape)
            radius = torch.hypot(y[:, None], x[None, :])
            self.matrices = rows, columns, (radius <= self.cutoff * radius.max()).float()
        rows, columns, keep = self.matrices
        own_grid = self.layout.is_coarse or self.layout.is_fine
        image = tokens if own_grid else self.layout.full_grid(tokens)
        image = image.unflatten(1, grid.shape)
        # One side after the other: both at once would be a matrix of tokens by tokens.
        spectrum = torch.einsum("xw,bywc->byxc", columns, torch.einsum("yh,bhwc->bywc", rows, image)) * keep[..., None]
        low = torch.einsum("xw,bhxc->bhwc", columns, torch.einsum("yh,byxc->bhxc", rows, spectrum)).flatten(1, 2)
        return low if own_grid else self.layout.from_full_grid(low)


class FreqCaForecaster(Forecaster):
    """low(x) = low(0); high(x) = sum_{i<=m} D_i s^i H_i(s x) / i! of the high band, m = 2 and s = 0.71 as published.

    Exact for constants, and for features whose low band is constant and whose high band is a Hermite expansion. Paper
    and public code (Tammytcl/FreqCa) agree; the code offers a DFT along the token list and a 2-D DCT for square
    images, and the DCT is followed, for any rectangle. In a mixed sequence the band is taken on the full grid, where a
    coarse token fills the tokens it stands for.
    """

    def __init__(
        self, interval: int, *, split: Callable[[Tensor], Tensor], order: int = 2, scale: float = SCALE, **more
    ):
        self.split, self.order, self.scale, self.history = split, order, scale, order + 1
        super().__init__(interval, **more)

    def reset(self) -> None:
        super().reset()
        self.low: Tensor | None = None
        self.high = Differences(self.order)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.low, self.high.stack) if t is not None]

    def _observe(self, step, feature, sigma) -> None:
        self.low = self.split(feature)
        self.high.observe(step, feature - self.low)

    def _predict(self, step, sigma) -> Tensor:
        coefficients = hermite_coefficients(step - self.last, len(self.high.steps), self.scale)
        return self.low + self.high.evaluate(coefficients, self.backend)


@register_forecast
@dataclass(frozen=True)
class FreqCa(SeriesOptions):
    """FreqCa.

    Args:
        scale: s of the high band's Hermite forecast, above 0, at most 1.
        cutoff: where the low band ends, as a share of the largest radial frequency.
    """

    scale: float = SCALE
    cutoff: float = CUTOFF

    name = "freqca"

    def validate(self) -> None:
        self.set("scale", share("scale", self.scale))
        self.set("cutoff", share("cutoff", self.cutoff))

    def make(self, context: ForecastContext) -> Forecaster:
        return FreqCaForecaster(
            self.interval, split=LowPass(context.layout, self.cutoff), order=self.order, scale=self.scale,
            warmup=context.warmup, backend=context.backend,
        )  # fmt: skip

    def operations(self, numbers: int) -> float:
        return super().operations(numbers) + 2.0 * numbers  # the low band is one term more

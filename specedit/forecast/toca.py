"""ToCa (arXiv 2410.05317): between full steps the tokens that matter most are computed again, the others are reused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import number, share
from ..forecast_options import ForecastContext, ForecastOptions, register_forecast
from .base import Forecaster
from .kv_cache import KVCache, PartialForward

FRESH_RATIO = 0.1  # public FLUX code
STALENESS_WEIGHT = 0.25  # of the cache-frequency score relative to the importance

__all__ = ["FRESH_RATIO", "STALENESS_WEIGHT", "KVCache", "PartialForward", "ToCa", "ToCaForecaster", "fresh_tokens"]


def fresh_tokens(tokens: int, ratio: float = FRESH_RATIO) -> int:
    """How many of `tokens` target tokens a step between full ones computes."""
    return max(1, math.ceil(ratio * tokens))


class ToCaForecaster(Forecaster):
    """Token-wise recomputation.

    A full step keeps every block's keys and values. A step between runs the transformer on the text and on a tenth of
    the target tokens as queries, against the kept keys and values, of which it replaces the rows it computed; the
    other tokens' outputs are those of when they were computed last.

    score = importance + 0.25 * staleness, both in 0..1 for each sample: importance is high where the last block's
    value vectors are short (DuCa's criterion, arXiv 2412.18911, which needs no attention map; ToCa's s1 does, and no
    fused kernel returns one), staleness is the steps since a token was computed over the interval (ToCa's s3). ToCa's
    code keeps attention and MLP outputs and recomputes the MLP alone, with other tokens in every layer; here one set of
    tokens goes through all layers, attention included. Exact for constants.
    """

    def __init__(
        self, interval: int, *, fresh_ratio: float = FRESH_RATIO, staleness_weight: float = STALENESS_WEIGHT, **more
    ):
        self.fresh_ratio, self.staleness_weight = fresh_ratio, staleness_weight
        super().__init__(interval, **more)

    def reset(self) -> None:
        super().reset()
        self.store = KVCache()
        self.feature: Tensor | None = None
        self.age: Tensor | None = None  # (b, N) the step at which each token was computed last

    def tensors(self) -> list[Tensor]:
        return [] if self.feature is None else [self.feature]

    @property
    def memory(self) -> int:
        return super().memory + self.store.memory

    def select(self, step: int) -> Tensor:
        """(b, m) int64, ascending: the target tokens to compute at `step`."""
        tokens = self.feature.shape[1]
        _, values = list(self.store.entries.values())[-1]
        start = self.store.text_tokens
        length = values[:, start : start + tokens].float().square().sum((2, 3)).sqrt()
        low, high = length.amin(1, keepdim=True), length.amax(1, keepdim=True)
        importance = ((high - length) / (high - low).clamp_min(1e-12)).to(self.age.device)  # kept on the transformer's
        score = importance + self.staleness_weight * (step - self.age) / self.interval
        return score.topk(fresh_tokens(tokens, self.fresh_ratio), 1).indices.sort(1).values

    def merge(self, step: int, index: Tensor, fresh: Tensor) -> Tensor:
        """The feature with the computed tokens (b, m, C) in place."""
        self.feature = self.feature.scatter(1, index[..., None].expand_as(fresh), fresh)
        self.age = self.age.scatter(1, index, float(step))
        return self.feature

    def _observe(self, step, feature, sigma) -> None:
        self.feature = feature
        self.age = torch.full(feature.shape[:2], float(step), device=feature.device)

    def _predict(self, step, sigma) -> Tensor:
        return self.feature


@register_forecast
@dataclass(frozen=True)
class ToCa(ForecastOptions):
    """ToCa.

    Args:
        fresh_ratio: share of the target's tokens that a step between full ones computes, above 0, at most 1.
        staleness_weight: of a token's age relative to its importance, at least 0. No effect where all are computed.
    """

    fresh_ratio: float = FRESH_RATIO
    staleness_weight: float = STALENESS_WEIGHT

    name = "toca"
    token_wise = True

    def validate(self) -> None:
        self.set("fresh_ratio", share("fresh_ratio", self.fresh_ratio))
        expected = "a number of at least 0"
        self.set("staleness_weight", number("staleness_weight", self.staleness_weight, expected))
        if not 0 <= self.staleness_weight < math.inf:
            raise ValueError(f"staleness_weight: expected {expected}, got {self.staleness_weight!r}")
        if self.fresh_ratio == 1 and self.staleness_weight != STALENESS_WEIGHT:
            raise ValueError(
                f"staleness_weight: expected the default with fresh_ratio=1, which computes every token, got "
                f"{self.staleness_weight!r}"
            )

    def make(self, context: ForecastContext) -> Forecaster:
        return ToCaForecaster(
            self.interval, fresh_ratio=self.fresh_ratio, staleness_weight=self.staleness_weight, warmup=context.warmup,
            backend=context.backend,
        )  # fmt: skip

    def operations(self, numbers: int) -> float:
        return 0.0  # tokens that are computed again count as transformer work

    def recomputes(self, since: int) -> bool:
        return True

    def fresh_tokens(self, tokens: int) -> int:
        return fresh_tokens(tokens, self.fresh_ratio)

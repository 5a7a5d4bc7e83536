"""The caches of one part of a batch in one stage: a forecaster for each guidance branch, and what each step did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import FORECASTS, SpecEditConfig
from ..layout import MixedLayout
from . import lesa
from .base import Forecaster, PromptBoundCache
from .duca import DuCa
from .foca import FoCa
from .freqca import FreqCa, LowPass
from .hermite import Hermite
from .reuse import Reuse
from .taylor import Taylor
from .toca import PartialForward, ToCa

METHODS: dict[str, type[Forecaster]] = {
    "reuse": Reuse, "taylor": Taylor, "hermite": Hermite, "foca": FoCa, "freqca": FreqCa, "toca": ToCa, "duca": DuCa,
    "lesa": lesa.Lesa,
}  # fmt: skip
TOKEN_WISE = ("toca", "duca")


def forecast_flops(config: SpecEditConfig, numbers: int) -> float:
    """Operations of one forecast of a feature of `numbers` elements: a multiply-add for every term of its sum."""
    if config.forecast in ("reuse", *TOKEN_WISE):
        return 0.0  # tokens that are computed again count as transformer work
    terms = 3 if config.forecast == "foca" else config.forecast_history + (config.forecast == "freqca")
    return 2.0 * terms * numbers


@dataclass(frozen=True)
class StepKind:
    """What the latest step of a branch was: computed for all tokens, for `tokens` target tokens, or not at all."""

    full: bool
    tokens: int = 0
    flops: float = 0.0  # of the forecast itself, all samples


class ForecastRunner(PromptBoundCache):
    """Runs a stage's steps fully, in part or not at all.

    Args:
        first: whether this is the run's first stage.
        branches: guidance passes a step; each has a history of its own.
        predictor: trained weights of `forecast="lesa"`.
    """

    def __init__(
        self, config: SpecEditConfig, *, first: bool, branches: int, layout: MixedLayout,
        predictor: lesa.Predictor | None = None, backend: str | None = None,
    ):  # fmt: skip
        more: dict[str, Any] = {"warmup": config.forecast_warmup(first), "backend": backend}
        if FORECASTS[config.forecast] is not None:
            more["order"] = config.forecast_history - 1
        if config.forecast == "freqca":
            more["split"] = LowPass(layout)
        if config.forecast == "lesa":
            more["predictor"] = predictor
        self.config = config
        make = METHODS[config.forecast]
        self.branches: list[Forecaster] = [make(config.interval, **more) for _ in range(branches)]
        self.token_wise = config.forecast in TOKEN_WISE
        self.done = StepKind(full=True)

    @property
    def memory(self) -> int:
        """Bytes held by all branches."""
        return sum(forecaster.memory for forecaster in self.branches)

    def reset(self) -> None:
        for forecaster in self.branches:
            forecaster.reset()

    def step(
        self, step: int, sigma: float, compute: Callable[[list[PartialForward] | None], list[Tensor]]
    ) -> list[Tensor]:
        """The branches' outputs (b, N, C) of one step.

        `compute(None)` runs the transformer for every branch; with a TokenCall per branch it fills stores, or gives
        the outputs (b, m, C) of the tokens they name.
        """
        if self.branches[0].refresh(step):
            outputs = compute([PartialForward(f.store) for f in self.branches] if self.token_wise else None)
            for forecaster, output in zip(self.branches, outputs, strict=True):
                forecaster.observe(step, output, sigma)
            self.done = StepKind(full=True)
            return outputs
        if self.token_wise and self.branches[0].recomputes(step - self.branches[0].last):
            calls = [PartialForward(f.store, f.select(step)) for f in self.branches]
            outputs = compute(calls)
            self.done = StepKind(full=False, tokens=calls[0].index.shape[1])
            return [f.merge(step, c.index, y) for f, c, y in zip(self.branches, calls, outputs, strict=True)]
        outputs = [forecaster.predict(step, sigma) for forecaster in self.branches]
        self.done = StepKind(full=False, flops=sum(forecast_flops(self.config, output.numel()) for output in outputs))
        return outputs

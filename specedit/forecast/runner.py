"""The caches of one part of a batch in one stage: a forecaster for each guidance branch, and what each step did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..forecast_options import ForecastContext, ForecastOptions
from ..layout import MixedLayout
from .base import Forecaster, PromptBoundCache
from .kv_cache import PartialForward


@dataclass(frozen=True)
class StepKind:
    """What the latest step of a branch was: computed for all tokens, for `tokens` target tokens, or not at all."""

    full: bool
    tokens: int = 0
    flops: float = 0.0  # of the forecast itself, all samples


class ForecastRunner(PromptBoundCache):
    """Runs a stage's steps fully, in part or not at all.

    Args:
        options: of the method.
        first: whether this is the run's first stage.
        branches: guidance passes a step; each has a history of its own.
        layout: of the target's tokens.
        shared: what the options' `prepare` returned for this run.
        backend: of specedit_kernels.
    """

    def __init__(
        self, options: ForecastOptions, *, first: bool, branches: int, layout: MixedLayout, shared: Any = None,
        backend: str | None = None,
    ):  # fmt: skip
        self.options = options
        context = ForecastContext(layout, options.warmup(first), backend, shared)
        self.branches: list[Forecaster] = [options.make(context) for _ in range(branches)]
        self.last_step = StepKind(full=True)

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

        `compute(None)` runs the transformer for every branch; with a PartialForward per branch it fills stores, or
        gives the outputs (b, m, C) of the tokens they name.
        """
        if self.branches[0].refresh(step):
            outputs = compute([PartialForward(f.store) for f in self.branches] if self.options.token_wise else None)
            for forecaster, output in zip(self.branches, outputs, strict=True):
                forecaster.observe(step, output, sigma)
            self.last_step = StepKind(full=True)
            return outputs
        if self.options.token_wise and self.options.recomputes(step - self.branches[0].last):
            calls = [PartialForward(f.store, f.select(step)) for f in self.branches]
            outputs = compute(calls)
            self.last_step = StepKind(full=False, tokens=calls[0].index.shape[1])
            return [f.merge(step, c.index, y) for f, c, y in zip(self.branches, calls, outputs, strict=True)]
        outputs = [forecaster.predict(step, sigma) for forecaster in self.branches]
        flops = sum(self.options.operations(output.numel()) for output in outputs)
        self.last_step = StepKind(full=False, flops=flops)
        return outputs

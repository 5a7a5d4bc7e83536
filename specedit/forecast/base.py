"""The protocol of a temporal feature cache: observe full steps, forecast the ones in between, say when to refresh.

What is cached is the transformer's own output for the target tokens, (b, N, C) float32, before guidance. The published
caches keep the outputs of every attention and MLP module; TaylorSeer's and diffusers' "lite" mode keep proj_out's
output alone, and that is what is followed here: a cached step then runs none of the transformer (well below 5 % of a
full step), the cache holds 64 channels a token instead of two times 57 blocks of 3072, and nothing reaches into the
model, so LoRA, compilation, offloading and quantisation behave as without a cache. The token-wise caches (toca, duca)
do need the blocks and keep keys and values besides.

Time is counted in steps of a stage, as all public code does; `sigma` is there for forecasters that depend on the noise
level. Histories belong to one stage of one part of a batch and one guidance branch: they are made where the stage is
entered and dropped with it, so nothing stale can reach another token, sample, branch or run.

To add a method, write one file: here, or in a package of your own with an entry point of the group
`specedit.forecasts`. It holds a `Forecaster` and, registered, its options:

    class LastForecaster(Forecaster):
        def reset(self): super().reset(); self.feature = None
        def tensors(self): return [] if self.feature is None else [self.feature]
        def _observe(self, step, feature, sigma): self.feature = feature
        def _predict(self, step, sigma): return self.feature

    @register_forecast
    @dataclass(frozen=True)
    class Last(ForecastOptions):       # fields become options: Last(interval=3)
        name = "last"                  # forecast="last"
        def make(self, context): return LastForecaster(self.interval, warmup=context.warmup)
        def operations(self, numbers): return 0.0

`ForecastOptions` has the rest: `validate` checks the fields, `history` says how many full steps a forecast needs,
`prepare` loads what a run shares (weights), and `context.layout` says where the tokens lie. A method whose steps
between full ones compute some tokens sets `token_wise`; its forecaster has `store`, `select` and `merge` as in `toca`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specedit_kernels import weighted_sum


def full_steps(steps: int, interval: int, warmup: int) -> list[bool]:
    """Which of a stage's steps are computed fully: the first `warmup`, then every `interval`-th."""
    last = min(steps, warmup) - 1
    return [i <= last or (i - last) % interval == 0 for i in range(steps)]


class PromptBoundCache:
    """A cache whose content answers one prompt."""

    embeddings: tuple[Tensor, int | None] | None = None  # and how often they were written to

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    def reset_if_prompt_changed(self, words: Tensor | None) -> None:
        """Start over where a callback has replaced the prompt's embeddings, or written to them in place."""
        written = None if words is None or words.is_inference() else words._version
        if self.embeddings is not None and (words is not self.embeddings[0] or written != self.embeddings[1]):
            self.reset()
        self.embeddings = None if words is None else (words, written)


class Forecaster:
    """One history of one feature.

    Args:
        interval: N, steps from one full step to the next.
        warmup: full steps before the first forecast; raised to `history` where that is more.
        backend: of specedit_kernels.
    """

    history = 1  # observations that a forecast needs

    def __init__(self, interval: int, *, warmup: int = 1, backend: str | None = None):
        self.interval, self.backend = interval, backend
        self.warmup = max(warmup, self.history)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.last: int | None = None  # the latest full step

    def refresh(self, step: int) -> bool:
        """Whether `step` must be computed fully."""
        return self.seen < self.warmup or step - self.last >= self.interval

    def observe(self, step: int, feature: Tensor, sigma: float | None = None) -> None:
        """Take in the feature (b, N, C) of a full step. ValueError unless steps grow and shapes stay."""
        if self.last is not None:
            if step <= self.last:
                raise ValueError(f"step: expected one after {self.last}, the last observed, got {step}")
            if feature.shape != self.shape:
                expected = tuple(self.shape)
                raise ValueError(f"feature: expected {expected} as before, got {tuple(feature.shape)}; reset first")
        self.shape = feature.shape
        self._observe(step, feature, sigma)
        self.seen, self.last = self.seen + 1, step

    def predict(self, step: int, sigma: float | None = None) -> Tensor:
        """The feature of a later step. ValueError before `history` observations."""
        if self.seen < self.history:
            raise ValueError(f"predict: expected {self.history} observed steps, got {self.seen}")
        if step <= self.last:
            raise ValueError(f"step: expected one after {self.last}, the last observed, got {step}")
        return self._predict(step, sigma)

    @property
    def memory(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """What is held."""
        raise NotImplementedError

    def _observe(self, step: int, feature: Tensor, sigma: float | None) -> None:
        raise NotImplementedError

    def _predict(self, step: int, sigma: float | None) -> Tensor:
        raise NotImplementedError


class Differences:
    """The latest feature and its backward differences, stacked (K, b, N, C).

    D_0 = F, D_{i+1} = (D_i - D_i of the full step before) / gap, K up to order + 1. With `divided` False the gap is
    that of the last two full steps for every order, as in the public TaylorSeer code (paper: arXiv 2503.06923, eq. 5,
    for equal gaps). With `divided` True it is the distance of the outermost steps that a difference spans: Newton's
    divided differences, right for unequal gaps too.
    """

    def __init__(self, order: int, *, divided: bool = False):
        self.order, self.divided = order, divided
        self.steps: list[int] = []  # newest first
        self.stack: Tensor | None = None

    def observe(self, step: int, feature: Tensor) -> None:
        rows = [feature]
        for i in range(min(self.order, len(self.steps))):
            gap = step - self.steps[i if self.divided else 0]
            rows.append((rows[i] - self.stack[i]) / gap)
        self.stack = torch.stack(rows)
        self.steps = [step, *self.steps][: self.order + 1]

    def evaluate(self, coefficients: list[float], backend: str | None) -> Tensor:
        """sum_i coefficients[i] * D_i in one pass."""
        # A tensor of numbers would be sent over, and the step would wait for it.
        weights = [torch.full((), c, dtype=torch.float32, device=self.stack.device) for c in coefficients]
        return weighted_sum(self.stack, torch.stack(weights), backend=backend)

"""ToCa (arXiv 2410.05317): between full steps the tokens that matter most are computed again, the others are reused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .base import Forecaster

FRESH_RATIO = 0.1  # public FLUX code
STALENESS_WEIGHT = 0.25  # of the cache-frequency score beside the importance


@dataclass(eq=False)
class KVCache:
    """Keys and values (b, S, heads, dim) of every attention module of one branch."""

    entries: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text_tokens: int = 0  # rows before the target's

    @property
    def memory(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.entries.values() for t in pair)

    def keep(self, rows: int) -> None:
        """Forget what lies beyond the first `rows` of S: packed sequences of a guidance branch that has left."""
        for module, (k, v) in self.entries.items():
            if k.shape[1] > rows:
                self.entries[module] = (k[:, :rows].contiguous(), v[:, :rows].contiguous())


@dataclass(frozen=True, eq=False)
class PartialForward:
    """How one branch of a step is computed; the store is filled, or the rows of what is computed replaced in it.

    All tokens (index None), the text and the target tokens `index` (b, m), or all target tokens without the text
    (`target`).
    """

    store: KVCache
    index: Tensor | None = None
    target: bool = False

    @property
    def partial(self) -> bool:
        return self.target or self.index is not None


def fresh_tokens(tokens: int) -> int:
    """How many of `tokens` target tokens a step between full ones computes."""
    return max(1, math.ceil(FRESH_RATIO * tokens))


class ToCa(Forecaster):
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

    @staticmethod
    def recomputes(since: int) -> bool:
        """Whether the `since`-th step after a full one computes tokens at all."""
        return True

    def select(self, step: int) -> Tensor:
        """(b, m) int64, ascending: the target tokens to compute at `step`."""
        tokens = self.feature.shape[1]
        _, values = list(self.store.entries.values())[-1]
        start = self.store.text_tokens
        length = values[:, start : start + tokens].float().square().sum((2, 3)).sqrt()
        low, high = length.amin(1, keepdim=True), length.amax(1, keepdim=True)
        importance = ((high - length) / (high - low).clamp_min(1e-12)).to(self.age.device)  # kept on the transformer's
        score = importance + STALENESS_WEIGHT * (step - self.age) / self.interval
        return score.topk(fresh_tokens(tokens), 1).indices.sort(1).values

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

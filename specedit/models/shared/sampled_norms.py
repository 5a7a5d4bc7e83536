"""Group norms of a part of a picture, by statistics of the whole that are estimated from squares of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGEST_SHARE = 1 / 4  # of the squares that are looked at
FEWEST, ENOUGH = 16, 32  # squares without which nothing is known of the whole, and more than which add little
GOLDEN = 0.618  # fractional parts of its multiples are spread evenly

Stage = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Mean and variance (groups,) float32 of what a group norm reads."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """Over all samples of x (n, C, h, w), as if they were one."""
        rows = x.float().unflatten(1, (groups, -1)).flatten(2)
        mean = rows.mean(-1).mean(0)
        return cls(mean, rows.square().mean(-1).mean(0) - mean.square())  # torch.var is ten times slower on a CPU


class GroupNorms(TorchFunctionMode):
    """Inside, the i-th group norm that is called normalises its input x (n, C, h, w) by `moments(i, x, groups)`.

    Only torch's calls in this thread change, and no module: offloading hooks keep working.
    """

    def __init__(self, moments: Callable[[int, Tensor, int], Moments]) -> None:
        super().__init__()
        self.moments, self.count = moments, 0

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def _norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        mean, variance = self.moments(self.count, x, groups)
        self.count += 1
        scale = weight.float().unflatten(0, (groups, -1)) * (variance + eps).rsqrt()[:, None]
        shift = bias.float().unflatten(0, (groups, -1)) - mean[:, None] * scale
        return torch.addcmul(shift.flatten()[:, None, None], x, scale.flatten()[:, None, None]).to(x.dtype)


def run(stages: Sequence[Stage], x: Tensor, moments: Sequence[Moments] | None = None) -> Tensor:
    """x through the stages; group norms as they are, or by these moments, one for each in their order."""
    if moments is not None:
        with GroupNorms(lambda i, x, groups: moments[i]):
            return run(stages, x)
    for stage in stages:
        x = stage(x)
    return x


def recorded(stages: Sequence[Stage], x: Tensor) -> list[Moments]:
    """Moments of each group norm's input, in their order. The samples of x (n, C, h, w) pass as if they were one."""
    kept: list[Moments] = []

    def note(i: int, x: Tensor, groups: int) -> Moments:
        kept.append(Moments.of(x, groups))
        return kept[i]

    with GroupNorms(note):
        run(stages, x)
    return kept


def one_in(height: int, width: int, side: int) -> int | None:
    """Of how many squares one is looked at, in a grid of this size; None if they were too few."""
    count = (height // side) * (width // side)
    every = max(round(1 / LARGEST_SHARE), count // ENOUGH)
    return every if count // every >= FEWEST else None


def squares(x: Tensor, side: int, every: int) -> Tensor:
    """One in `every` of the squares (n, C, side, side) of x (1, C, h, w), spread over rows and columns."""
    rows = x[0].unfold(1, side, side).unfold(2, side, side)  # (C, r, c, side, side)
    chosen = [rows[:, i, round(i * GOLDEN * every) % every :: every] for i in range(rows.shape[1])]
    return torch.cat(chosen, 1).transpose(0, 1).contiguous()

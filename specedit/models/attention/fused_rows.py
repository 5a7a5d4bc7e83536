"""Kept keys and values that move towards those of other rows, rotated to their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .sequences import Movable, Pair, Tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, n, H, D) with its pairs of even and odd numbers rotated by tables (n, D/2) or (b, n, D/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True, eq=False)
class FusedRows(Movable):
    """Rows of the stored keys and values that move towards other rows: weight * row + (1 - weight) * source.

    rows, sources: (b, f) int64. turn: tables (f, D/2) or (b, f, D/2) that rotate a source's key to the row's position.
    """

    rows: Tensor
    sources: Tensor
    turn: Tables
    weight: float

    @classmethod
    def between(cls, rows: Tensor, sources: Tensor, tables: Tables, of: tuple[Tensor, Tensor], weight: float) -> Self:
        """tables: of all positions, `of` these for rows and sources. The turn is the difference of their angles."""
        (cos, sin), (at, source) = tables, of
        turn = (
            cos[at] * cos[source] + sin[at] * sin[source],
            sin[at] * cos[source] - cos[at] * sin[source],
        )
        return cls(rows, sources, turn, weight)

    def fuse(self, own: Pair, beside: Pair | None = None) -> Pair:
        """Keys and values (b, S, H, D) with the rows fused. beside: those that have the sources; None: the same."""
        each = []
        for x, other, turn in zip(own, beside or own, (self.turn, None), strict=True):
            rows, sources = (i[..., None, None].expand(-1, -1, *x.shape[2:]) for i in (self.rows, self.sources))
            kept, source = x.gather(1, rows).float(), other.gather(1, sources).float()
            source = source if turn is None else rotate(source, *turn)
            each.append(x.scatter(1, rows, (self.weight * kept + (1 - self.weight) * source).to(x.dtype)))
        return each[0], each[1]

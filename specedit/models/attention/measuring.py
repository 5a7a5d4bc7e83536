"""A call that measures how much attention the target pays to every reference token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...method.reference_selection import ReferenceMass
from .contexts import Rotated
from .kept_keys import Wrapped
from .sequences import QueryRows


@dataclass(frozen=True, eq=False, kw_only=True)
class Measuring(Wrapped):
    """A whole call of one sample, in which every attention module adds to `mass`.

    texts: lengths of the text of every packed sequence [text | target | reference], or of the only one. target,
    reference: tokens of each.
    """

    mass: ReferenceMass
    texts: tuple[int, ...]
    target: int
    reference: int

    def attend(self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | None, processor: Any) -> Tensor:
        self.measure(scales[0], trimmed=query_rows is not None)
        return super().attend(scales, v, query_rows, processor)

    @torch.compiler.disable  # it adds to what outlives the call
    def measure(self, scale: Rotated, trimmed: bool) -> None:
        """trimmed: whether the queries are the target's alone, as in the last block."""
        whole, start = self.whole, 0
        for i, text in enumerate(self.texts):
            stop = start + text + self.target + self.reference
            rows = self.mass.rows.to(scale.q.device) + (i * self.target if trimmed else start + text)
            bias = None if whole.key_bias is None else whole.key_bias.expand(1, -1)[0, start:stop]
            self.mass.add(received(scale.q[0, rows], scale.k[0, start:stop], bias)[-self.reference :])
            start = stop


def received(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """(n,) float32: attention of queries (m, H, D) that each key (n, H, D) receives, summed over heads and queries."""
    logits = torch.einsum("mhd,nhd->hmn", q, k).float() / q.shape[-1] ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return weights.sum((0, 1))

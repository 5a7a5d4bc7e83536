"""Some of the target's tokens, with the keys and values that a call over all of them has left of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...forecast.kv_cache import Fusion, KVCache
from ..attention.fused_rows import FusedRows
from .attention import BesidePrefix
from .positions import Placed
from .prefix import SLOT


@dataclass(frozen=True, eq=False)
class SomeTokens:
    """Inputs of calls over some tokens, alike in every step over the same ones.

    of: the context of calls over all tokens, and the index (b, m) that was asked for. tokens: (b, n) int64, a multiple
    of four: in front the first token is repeated `padding` times. It gives the same each time, so nothing is hidden.
    """

    of: tuple[BesidePrefix, Tensor]
    tokens: Tensor
    padding: int
    placed: Placed
    context: BesidePrefix

    @classmethod
    def of_stage(cls, whole: BesidePrefix, placed: Placed, before: int, index: Tensor) -> SomeTokens:
        """whole, placed, before: context, positions and padding of calls over all tokens."""
        padding = -index.shape[1] % SLOT
        tokens = torch.cat([index[:, :1].expand(-1, padding), index], 1)
        rows = before + tokens  # the padding of the whole call is kept too, and its keys are hidden
        at = placed.frequencies[rows]
        tables = at.real.contiguous(), at.imag.contiguous()
        context = whole.of_rows(rows, tables)
        count = tokens.shape[1]  # attention has every sample's positions; the transformer's only have to be as many
        return cls((whole, index), tokens, padding, Placed(count, placed.frequencies[:count]), context)

    def with_kept(self, store: KVCache, fused: FusedRows | None) -> SomeTokens:
        """The same with what a branch keeps."""
        return replace(self, context=self.context.with_entries(store.entries, fused))


def fused_rows(within: tuple[Tensor, Tensor], placed: Placed, before: int, fusion: Fusion) -> FusedRows:
    """The target's rows that a call's fusion names, and the prefix's.

    within: where references stand there, as of `references_within`. placed, before: as of `SomeTokens.of_stage`.
    """
    at, tables = within
    rows = before + fusion.target
    turn = placed.frequencies[rows] * tables[fusion.reference].conj()
    return FusedRows(rows, at[fusion.reference], (turn.real.contiguous(), turn.imag.contiguous()), fusion.weight)

"""Some tokens of a layout: pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .layout import MixedLayout


@dataclass(frozen=True, eq=False)
class PartLayout(MixedLayout):
    """The tokens `index` (m,) int64 of the layout `whole`, at the positions that they have there.

    Grid, cells and resolutions are those of the whole.
    """

    whole: MixedLayout = field(kw_only=True)
    index: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, whole: MixedLayout, index: Tensor) -> PartLayout:
        """The tokens `index` of `whole`."""
        own = (whole.grid, whole.expanded, whole.lead, whole.origin, whole.counted)
        return cls(*own, whole=whole, index=index)

    @classmethod
    def fine(cls, whole: MixedLayout) -> PartLayout:
        """The fine tokens of a layout, without its locked cells."""
        device = whole.expanded.device
        return cls.of(whole, torch.arange(len(whole.locked_cells), whole.tokens, device=device))

    @cached_property
    def tokens(self) -> int:
        return len(self.index)

    @property
    def cells_of_tokens(self) -> Tensor:
        return self.whole.cells_of_tokens[self.index]

    @cached_property
    def area(self) -> Tensor:
        return self.whole.area[self.index]

    @cached_property
    def positions(self) -> Tensor:
        return self.whole.positions[self.index]

    def full_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (B, m, C) on the fine grid (B, grid.tokens, C); zero where the part has none."""
        padded = tokens.new_zeros(len(tokens), self.whole.tokens, tokens.shape[2])
        padded[:, self.index] = tokens
        return self.whole.full_grid(padded)

    def from_full_grid(self, tokens: Tensor) -> Tensor:
        return self.whole.from_full_grid(tokens)[:, self.index]

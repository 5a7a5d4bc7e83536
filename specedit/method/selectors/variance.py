"""Fresco's selector: the variance of a token's channels."""

from __future__ import annotations

from torch import Tensor

from .. import draft as drafts
from . import Selector, register_selector


@register_selector
class Variance(Selector):
    """The share of cells whose tokens vary most over their channels."""

    name = "variance"

    def score(self, adapter, pipe, state, draft, draft_grid, config) -> Tensor:
        large = drafts.upsample(draft, draft_grid, config.draft_scale, state.grid)
        return large.view(state.batch, *state.grid.shape, -1).var(-1)

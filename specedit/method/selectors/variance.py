"""Fresco's selector: the variance of a token's channels."""

from __future__ import annotations

from torch import Tensor

from ...layout import TokenGrid
from .. import draft as drafts
from ..adapter import Run
from . import Selector, register_selector


@register_selector
class Variance(Selector):
    """The share of cells whose tokens vary most over their channels."""

    name = "variance"

    def score(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> Tensor:
        grid = run.state.grid
        large = drafts.upsample(draft, draft_grid, run.config.draft_scale, grid)
        return large.view(run.state.batch, *grid.shape, -1).var(-1)

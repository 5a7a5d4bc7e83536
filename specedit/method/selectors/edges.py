"""RALU's selector: Canny edges of the decoded prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import TokenGrid
from .. import draft as drafts
from ..adapter import Run
from ..canny import canny
from . import Selector, not_finite, register_selector


@register_selector
class Edges(Selector):
    """The share of cells whose tokens hold most edge pixels."""

    name = "edges"
    needs_decoder = "picture"

    def score(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> Tensor:
        grid = run.state.grid
        large = drafts.upsample(draft, draft_grid, run.config.draft_scale, grid)
        image = run.adapter.decode(run.pipe, run.state, large, "pt").float()
        score = F.adaptive_avg_pool2d(canny(image).float()[:, None], grid.shape)[:, 0]
        # Comparing with NaN finds no edge, which would hide it.
        return torch.where(not_finite(image)[:, None, None], torch.nan, score)

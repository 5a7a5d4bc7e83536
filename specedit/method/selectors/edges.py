"""RALU's selector: Canny edges of the decoded prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import draft as drafts
from ..canny import canny
from . import Selector, not_finite, register_selector


@register_selector
class Edges(Selector):
    """The share of cells whose tokens hold most edge pixels."""

    name = "edges"
    needs_decoder = "picture"

    def score(self, adapter, pipe, state, draft, draft_grid, config) -> Tensor:
        large = drafts.upsample(draft, draft_grid, config.draft_scale, state.grid)
        image = adapter.decode(pipe, state, large, "pt").float()
        score = F.adaptive_avg_pool2d(canny(image).float()[:, None], state.grid.shape)[:, 0]
        # Comparing with NaN finds no edge, which would hide it.
        return torch.where(not_finite(image)[:, None, None], torch.nan, score)

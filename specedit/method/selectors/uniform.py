"""No selection: nothing is expanded beyond the uniform coverage of eq. 9."""

from __future__ import annotations

from torch import Tensor

from ...layout import TokenGrid
from ..adapter import Run
from . import Selector, register_selector


@register_selector
class Uniform(Selector):
    """No cell, whatever the draft."""

    name = "uniform"
    needs_draft = False

    def score(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> Tensor:
        raise NotImplementedError("uniform takes no draft")

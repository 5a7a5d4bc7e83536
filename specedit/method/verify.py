"""Verification (paper, section 3.3.2): which cells does a clean prediction of the edit change?

The draft is verified before the main run. Where unedited cells are given back, the end of the coarse stage is verified
in the same way: the draft may have edited another object. Without a draft, the coarse stage alone is verified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import TokenGrid
from . import selectors
from .adapter import LayoutGroup, Run
from .draft import shrink


def verify_draft(run: Run, draft: LayoutGroup) -> tuple[Tensor | None, Tensor]:
    """Score on the token grid (eq. 6), and the cells (B, cells_h, cells_w) that the draft changes (eq. 7)."""
    with run.trace.timed("verify"):
        return _select(run, draft.tokens, draft.layout.grid)


def verify_coarse(run: Run, groups: list[LayoutGroup]) -> tuple[Tensor | None, Tensor]:
    """Score and cells that the coarse stage's clean prediction changes, verified as a draft is."""
    state = run.state
    with run.trace.timed("second look" if run.config.uses_draft else "verify"):
        clean = torch.empty_like(state.noise[:, : state.grid.coarse().tokens])
        for group in groups:
            assert group.clean is not None  # `euler_step` kept it
            clean[group.rows] = group.clean
        return _select(run, *shrink(clean, state.grid.coarse(), run.config.draft_scale // 2))


def _select(run: Run, tokens: Tensor, grid: TokenGrid) -> tuple[Tensor | None, Tensor]:
    return selectors.select(run, tokens, grid)

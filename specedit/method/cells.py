"""What becomes of every coarse cell (paper, section 3.4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import FULL_EDIT_SHARE
from .adapter import Run
from .selectors import uniform_cells


@dataclass(frozen=True)
class CellMasks:
    """Masks (B, cells_h, cells_w) bool.

    detected: reported as edited. edited: not taken from the reference; a sample that is nearly all edited is edited as
    a whole. refined: computed at full resolution. known_unchanged: verified as unedited, so that the reference's detail
    is known to be the output's.
    """

    detected: Tensor
    edited: Tensor
    refined: Tensor
    known_unchanged: Tensor

    @staticmethod
    def from_detected(run: Run, detected: Tensor, *, verified: bool) -> CellMasks:
        """Eq. 10: the union of edited cells and a sparse uniform set (eq. 9).

        detected: cells that a draft, a mask or the coarse stage says change. verified: whether the others are known to
        stay.
        """
        state, config = run.state, run.config
        if config.preserves_unedited:
            # If nothing was detected, edit the whole sample; otherwise it would be returned unchanged.
            detected = detected | ~detected.flatten(1).any(1)[:, None, None]
        if state.uncovered_cells is not None:  # beyond the picture, nothing can be taken from it
            detected = detected | state.uncovered_cells
        edited = everything_if_nearly(detected)
        refined = edited | uniform_cells(state.grid, config.uniform_stride or 0, state.device)
        return CellMasks(detected, edited, refined, ~edited & verified)


def everything_if_nearly(edited: Tensor) -> Tensor:
    """Samples that are nearly all edited are edited as a whole: then every restore is the full one."""
    share = edited.flatten(1).float().mean(1)
    return edited | (share > FULL_EDIT_SHARE)[:, None, None]


def no_cells(run: Run) -> Tensor:
    """A mask without any cell."""
    shape = (run.state.batch, *run.state.grid.coarse().shape)
    return torch.zeros(shape, dtype=torch.bool, device=run.state.device)

"""Locked cells that leave the target of a mixed sequence: `locked="cached"` and `locked="reference"`.

They were found unedited, so their state is known at every noise level: x_s = (1 - s) r + s e, where r is the reference
at their resolution and e the call's own noise, reduced to their cell. Its velocity is e - r = (x_s - r) / s. Expanded,
a locked cell is (1 - s) r + s e on the fine grid too, because its detail is the reference's and its noise the call's.

"cached" computes all target tokens in the first step of a stage and in every 9th after it, and the fine ones (with the
text) in the steps between, against the keys and values that every block kept. SpotEdit (arXiv 2512.22323) does so at
full resolution, with resets at steps 13, 22 and 31. "reference" leaves locked cells out of the sequence: the reference
beside it shows what lies there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..part_layout import PartLayout
from .adapter import LayoutGroup, Run
from .groups import reference_on_layout, start_tokens


@dataclass
class LockedCells:
    """Of a group, whose first tokens they are. reference: (b, n, C), clean. part: the group without them, where they
    leave the sequence."""

    reference: Tensor
    part: LayoutGroup | None

    def computed(self, group: LayoutGroup) -> LayoutGroup:
        """The group that the transformer computes, at the group's state."""
        if self.part is None:
            return group
        self.part.tokens = group.tokens[:, self.reference.shape[1] :]
        return self.part

    def join(self, group: LayoutGroup, i: int, velocity: Tensor) -> Tensor:
        """The velocity (b, N, C) of all tokens in step `i`, from one whose last tokens are the fine ones."""
        count = self.reference.shape[1]
        known = (group.tokens[:, :count] - self.reference) / group.sigmas[i]
        return torch.cat([known, velocity[:, velocity.shape[1] - (group.layout.tokens - count) :]], 1)


def leave_out_locked(run: Run, groups: list[LayoutGroup]) -> list[LayoutGroup]:
    """Groups at the beginning of a stage, whose locked cells leave the target where the configuration says so."""
    for group in groups:
        if run.config.locked != "coarse" and group.layout.is_mixed:
            _leave_out(run, group)
    return groups


def _leave_out(run: Run, group: LayoutGroup) -> None:
    state, layout, sigma, count = run.state, group.layout, group.sigmas[0], len(group.layout.locked_cells)
    reference = reference_on_layout(state.aligned[group.rows], layout)[:, :count]
    noise = start_tokens(state.noise[group.rows], layout)[:, :count]
    fine = group.tokens[:, count:]
    group.tokens = torch.cat([(1 - sigma) * reference + sigma * noise, fine], 1)
    part = None
    if run.config.locked == "reference":
        beside = group.reference, group.reference_layout
        part = LayoutGroup(group.rows, PartLayout.fine(layout), *beside, fine, group.sigmas)
    group.locked = LockedCells(reference, part)


def fine_index(group: LayoutGroup) -> Tensor:
    """(b, m) int64: the fine tokens among a group's."""
    count, device = len(group.layout.locked_cells), group.tokens.device
    return torch.arange(count, group.layout.tokens, device=device).expand(len(group.rows), -1)

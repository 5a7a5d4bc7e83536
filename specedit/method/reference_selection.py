"""Reference selection, after ReCAST (OpenReview UGmI6K7PoH): few reference tokens get most of the target's attention.

The first step of a stage runs with the whole reference, and every attention module adds up

    m_j = sum over heads h and target tokens i of softmax_j(q_ih k_jh / sqrt(d) + bias_j)

for each reference token j, over a sample of target tokens and all guidance branches. The later steps run with the
tokens of largest m alone; those in cells beside edited ones come first, because seams must fit. ReCAST ranks by the
attention between images, too, and keeps about 600 of 4096 tokens; its abstract, all that is public, says "a
timestep-adaptive subset", which here is one for each stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import LayoutSet, MixedLayout
from ..part_layout import PartLayout
from .adapter import EditState, LayoutGroup, Run
from .cells import CellMasks
from .schedule import Stage
from .selectors import dilate

QUERY_ROWS = 64  # target tokens whose attention is measured, evenly spaced


def kept_tokens(keep: float, tokens: int) -> int:
    """How many of so many reference tokens a share of them is."""
    return max(1, math.ceil(keep * tokens))


def measured_rows(target: int) -> int:
    """How many of so many target tokens have their attention measured."""
    return min(QUERY_ROWS, target)


@dataclass(eq=False)
class ReferenceMass:
    """Attention that a sample's reference tokens get in a step. rows: (q,) int64, of target tokens that are measured.
    first: (R,) bool, reference tokens that come before all others. count: how many will be kept."""

    rows: Tensor
    first: Tensor
    count: int
    total: Tensor | None = None

    def add(self, mass: Tensor) -> None:
        """Add the mass (R,) of one attention module and guidance branch."""
        mass = mass.to(self.rows.device)  # blocks may lie on several devices
        self.total = mass if self.total is None else self.total + mass

    def kept(self) -> Tensor:
        """(count,) int64, ascending: the tokens to keep."""
        assert self.total is not None  # the adapter has measured it
        share = torch.nan_to_num(self.total / self.total.sum())
        return (share + 2 * self.first).topk(self.count).indices.sort().values


def measures(run: Run, stage: Stage) -> bool:
    """Whether a stage selects reference tokens: in one of a single step no later step would be shorter."""
    return run.config.reference_keep is not None and run.config.reference_keep < 1 and stage.steps > 1


def select_reference(run: Run, groups: list[LayoutGroup], stage: Stage, cells: CellMasks) -> list[LayoutGroup]:
    """Groups of one sample each at the beginning of a stage, whose first step will measure the reference's mass."""
    for group in (group.computed for group in groups if measures(run, stage)):
        assert run.config.reference_keep is not None and len(group.rows) == 1
        target, reference = group.tokens.shape[1], group.reference.shape[1]
        rows = torch.arange(measured_rows(target), device=group.tokens.device) * target // measured_rows(target)
        first = beside_edited(run.state, cells.edited[group.rows], group.reference_layout)
        group.mass = ReferenceMass(rows, first, kept_tokens(run.config.reference_keep, reference))
    return groups


def shorten_reference(group: LayoutGroup) -> None:
    """Keep what the step that has just run attended to."""
    assert group.mass is not None
    index = group.mass.kept()
    group.reference, group.reference_layout = group.reference[:, index], selected(group.reference_layout, index)
    group.inputs, group.mass = {}, None


def selected(layout: MixedLayout | LayoutSet, index: Tensor) -> MixedLayout | LayoutSet:
    """The tokens `index`, ascending, of one reference's layout or of several."""
    if isinstance(layout, MixedLayout):
        return PartLayout.of(layout, index)
    parts, start = [], 0
    for one in layout.layouts:
        own = index[(index >= start) & (index < start + one.tokens)] - start
        parts.append(PartLayout.of(one, own))
        start += one.tokens
    return LayoutSet(tuple(parts))


def beside_edited(state: EditState, edited: Tensor, layout: MixedLayout | LayoutSet) -> Tensor:
    """(R,) bool: tokens of the picture being edited that lie in the cells around edited ones (1, cells_h, cells_w)."""
    ring = dilate(edited, 1) & ~edited
    each = []
    for i, one in enumerate(layout.layouts):
        if i != state.edited:
            each.append(torch.zeros(one.tokens, dtype=torch.bool, device=ring.device))
            continue
        own = ring if state.placement.is_same else state.placement.cells().inverse.place_mask(ring)
        each.append(own.flatten()[one.cells_of_tokens])
    return torch.cat(each)

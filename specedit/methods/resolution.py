"""What the methods that change resolution share: their options, layouts, and the way from one layout to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import integer, sequence
from ..field_checks import scaled_steps
from ..layout import MixedLayout
from ..method.adapter import EditState, LayoutGroup, Run
from ..method.canny import canny
from ..method.groups import alike, group_at
from ..method.selectors import highest
from ..method_options import Method
from ..method_plan import PlannedStage, all_steps

LEAST_SIDE = 4  # tokens: a picture that can be halved twice
TIE = 1e-6  # of the random numbers that decide between equal counts of edge pixels

Move = Callable[[int, Tensor, MixedLayout, MixedLayout], Tensor]


def check_stage_steps(name: str, value: Any) -> tuple[int, int, int]:
    """Model evaluations of three stages, each at least 1. TypeError or ValueError names the field."""
    expected = "three integers of at least 1, one for each stage"
    first, second, third = (integer(name, n, 1, expected) for n in sequence(name, value, 3, expected))
    return first, second, third


def scale_stage_steps(method: Method, steps: tuple[int, int, int], n: int) -> tuple[int, int, int]:
    """`n` model evaluations in the proportions of `steps`. ValueError where a stage would have none."""
    if n < len(steps):
        raise ValueError(
            f"num_inference_steps: expected at least {len(steps)} with method={method.name!r}, one for each stage, "
            f"got {n}"
        )
    first, second, third = scaled_steps(steps, n)
    return first, second, third


def planned_stages(steps: tuple[int, int, int], early: float) -> list[PlannedStage]:
    """All cells coarse, a share of them split, and all tokens fine."""
    coarse, mixed, full = steps
    return [
        all_steps("coarse", "coarse", coarse),
        all_steps("mixed", "mixed", mixed, early),
        all_steps("full", "fine", full),
    ]


def without_key_bias(run: Run) -> Run:
    """The run as a method wants it that does not weight coarse keys."""
    return dataclasses.replace(run, config=dataclasses.replace(run.config, method="specedit", key_bias="none"))


def check_size(method: Method, state: EditState) -> None:
    """ValueError where the output is too small to be halved twice."""
    if min(state.grid.shape) < LEAST_SIDE:
        side = state.pixels_per_token
        height, width = (n * side for n in state.grid.shape)
        raise ValueError(
            f"height, width: expected at least {LEAST_SIDE * side} px a side with method={method.name!r}, which works "
            f"at half the resolution, got {height} x {width}"
        )


def regroup(
    run: Run,
    before: Sequence[LayoutGroup],
    layouts: list[MixedLayout],
    sigmas: Callable[[MixedLayout], list[float]],
    move: Move,
) -> list[LayoutGroup]:
    """Every sample on its new layout.

    layouts: one for each sample. sigmas: of a stage on a layout. move(row, tokens, old, new): one sample's tokens
    (1, old.tokens, C) as (1, new.tokens, C), at the first of these sigmas.
    """
    held = {row: (group, k) for group in before for k, row in enumerate(group.rows)}
    groups = []
    for rows in alike(layouts, [False] * len(layouts)):
        layout, moved = layouts[rows[0]], []
        for row in rows:
            group, k = held[row]
            moved.append(move(row, group.tokens[k : k + 1], group.layout, layout))
        groups.append(group_at(run, rows, layout, torch.cat(moved), sigmas(layout)))
    return groups


def repeated(tokens: Tensor, old: MixedLayout, new: MixedLayout) -> Tensor:
    """Tokens (B, old.tokens, C) on a layout that splits more cells (B, new.tokens, C): their pixels are repeated."""
    cells = tokens.new_zeros(tokens.shape[0], old.grid.coarse().tokens, tokens.shape[2])
    cells[:, old.locked_cells] = tokens[:, : len(old.locked_cells)]
    # Locked cells are not taken from the full grid: it lacks the pixels that lie beyond an odd side.
    return torch.cat([cells[:, new.locked_cells], old.full_grid(tokens)[:, new.fine_tokens]], 1)


def top_share(score: Tensor, share: float) -> Tensor:
    """(B, cells_h, cells_w) bool: the `share` of every sample's cells with the largest score, at least one."""
    return highest(score, max(1, int(share * score[0].numel())))


def edge_shares(run: Run, group: LayoutGroup) -> Tensor:
    """(B, cells_h, cells_w) float32: which share of a cell's pixels Canny finds to be edges.

    group: all samples after the coarse stage. Its clean prediction is decoded as the small picture that it is.
    """
    state = run.state
    assert group.clean is not None  # `run_stage` kept it
    with run.trace.timed("edges"):
        small = dataclasses.replace(state, grid=state.grid.coarse())
        image = run.adapter.decode(run.pipe, small, group.clean, "pt").float()
        return F.avg_pool2d(canny(image).float()[:, None], state.pixels_per_token)[:, 0]


def ties_broken(shares: Tensor, state: EditState) -> Tensor:
    """Shares of edge pixels (B, cells_h, cells_w), equal ones in random order."""
    return shares + TIE * random_scores(state)


def random_scores(state: EditState) -> Tensor:
    """(B, cells_h, cells_w): a random number for every cell."""
    cells = state.grid.coarse()
    return state.draw(cells.tokens)[..., 0].view(state.batch, *cells.shape)

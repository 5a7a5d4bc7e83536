"""Steps at full resolution that compute all tokens, or some of the target's with kept keys and values of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..forecast import Fusion, TokenKVCache
from ..layout import MixedLayout
from .adapter import Adapter, LayoutGroup, Run
from .denoise import forward_calls
from .groups import new_group
from .masks import cells_of_mask
from .schedule import Stage
from .selectors import to_cells, to_tokens


def refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot leave tokens out (one phrase), or None."""
    if adapter.skips_tokens:
        return None
    return f"because {adapter.name} computes all tokens or none"


def start_regions(run: Run, stage: Stage, alike: Tensor | None = None) -> list[LayoutGroup]:
    """Groups at full resolution with the call's own noise: one for each sample, since each finds its own region.

    alike: (B, N) bool, known regions; samples with equal ones share a group.
    """
    state = run.state
    layout = MixedLayout.all_fine(state.grid, state.device)
    rows: dict[bytes | int, list[int]] = {}
    for row in range(state.batch):
        rows.setdefault(row if alike is None else alike[row].cpu().numpy().tobytes(), []).append(row)
    groups = [new_group(run, each, layout, state.noise[each], stage, stage.start) for each in rows.values()]
    for group in groups:
        group.tokens_kv = TokenKVCache()
    return groups


def hears_prompt(run: Run, group: LayoutGroup) -> bool:
    """Whether the group's cache answers the prompt as it is now, which a callback may have replaced."""
    assert group.tokens_kv is not None
    group.tokens_kv.reset_if_prompt_changed(run.state.conditioning.prompt_embeds)
    return not group.tokens_kv.stale


def whole_velocity(run: Run, group: LayoutGroup, i: int, *, keep: bool) -> Tensor:
    """Velocity (b, N, C) of step `i` over all tokens. keep: their keys and values, for steps over some tokens."""
    assert group.tokens_kv is not None
    run.set_current_timestep(group.sigmas[i])
    run.trace.calls += forward_calls(run, group, run.state.branches)
    partial = None
    if keep:
        hears_prompt(run, group)
        partial = group.tokens_kv.whole(run.state.branches)
    return run.adapter.guide(run, run.adapter.predict(run, group, group.sigmas[i], partial))


def some_velocity(run: Run, group: LayoutGroup, i: int, index: Tensor, fusion: Fusion | None = None) -> Tensor:
    """Velocity (b, m, C) of step `i` for the target tokens `index` (b, m)."""
    assert group.tokens_kv is not None
    run.set_current_timestep(group.sigmas[i])
    partial = group.tokens_kv.some(index, fusion)
    run.trace.calls += forward_calls(run, group, run.state.branches, partial[0])
    group.reused += 1
    return run.adapter.guide(run, run.adapter.predict(run, group, group.sigmas[i], partial))


def index_of(mask: Tensor) -> Tensor:
    """(b, m) int64, ascending: where a mask (b, N) bool is True, equally often in every row."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def known_tokens(run: Run, edit_mask: Any) -> Tensor | None:
    """(B, N) bool: tokens that the caller's mask says are edited, and those beyond the picture; None without a mask."""
    if edit_mask is None:
        return None
    state = run.state
    edited = to_tokens(cells_of_mask(edit_mask, state), state.grid).flatten(1)
    return edited if state.covered is None else edited | ~state.covered.flatten()


def end_regions(run: Run, groups: Sequence[LayoutGroup], edited: Sequence[Tensor]) -> Tensor:
    """(B, cells_h, cells_w) bool: cells with a token that is edited, by each group's (b, N) bool. Frees the caches."""
    grid = run.state.grid
    cells = torch.empty((run.state.batch, *grid.coarse().shape), dtype=torch.bool, device=run.state.device)
    for group, tokens in zip(groups, edited, strict=True):
        cells[group.rows] = to_cells(tokens.unflatten(1, grid.shape).float()) > 0
        group.tokens_kv = None
    return cells


def reference_tokens(run: Run) -> Tensor:
    """(N,) int64: for every token of the output, the token of the references that lies there, at the border the nearest
    one. References are counted in one row."""
    state = run.state
    before = sum(placement.reference.tokens for placement in state.placements[: state.edited])
    own = torch.arange(state.placement.reference.tokens, device=state.device, dtype=torch.float64)
    return before + state.placement.place(own[None, :, None])[0, :, 0].long()

"""Steps at full resolution that compute all tokens, or some of the target's with kept keys and values of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forecast import Fusion, TokenKVCache
from ..layout import MixedLayout, TokenGrid
from .adapter import Adapter, LayoutGroup, Run
from .denoise import forward_calls
from .groups import new_group
from .schedule import Stage


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


def tokens_of_cells(cells: Tensor, grid: TokenGrid) -> Tensor:
    """(B, N) bool of tokens whose cell in (B, cells_h, cells_w) is True."""
    grown = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return grown[:, : grid.height, : grid.width].flatten(1)


def cells_of_tokens(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """(B, cells_h, cells_w) bool of cells with a token in (B, N) that is True."""
    image = tokens.unflatten(1, grid.shape)[:, None].float()
    return F.max_pool2d(image, 2, ceil_mode=True)[:, 0] > 0


def reference_tokens(run: Run) -> Tensor:
    """(N,) int64: for every token of the output, the token of the references that lies there, at the border the nearest
    one. References are counted in one row."""
    state = run.state
    before = sum(placement.reference.tokens for placement in state.placements[: state.edited])
    own = torch.arange(state.placement.reference.tokens, device=state.device, dtype=torch.float64)
    return before + state.placement.place(own[None, :, None])[0, :, 0].long()

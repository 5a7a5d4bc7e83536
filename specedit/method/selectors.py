"""Which coarse cells are split into fine tokens (paper, sections 3.3.2 and 3.4.2).

"semantic" is the paper's verification. "edges" and "variance" are the selectors it compares with (RALU's Canny edges
of the decoded prediction, Fresco's channel variance); they rank cells and take a fixed share. "uniform" takes none
beyond the uniform coverage.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SpecEditConfig
from ..layout import TokenGrid
from . import draft as drafts
from .adapter import Adapter, EditState
from .canny import canny

TOP_SHARE = 0.3  # of the cells: RALU's up_ratio for its 4x setting


def discrepancy(first: list[Tensor], second: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Eq. 6: squared distance of channel-normalised features, resized to `size` and averaged over layers.

    Features are (B, c, h, w); returns (B, *size) float32 in 0..4.
    """
    total = 0.0
    for a, b in zip(first, second, strict=True):
        distance = (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1, keepdim=True)
        total = total + F.interpolate(distance, size=size, mode="bilinear", antialias=True, align_corners=False)[:, 0]
    return total / len(first)


def semantic_score(
    adapter: Adapter, pipe: Any, state: EditState, draft: Tensor, draft_grid: TokenGrid, config: SpecEditConfig
) -> Tensor:
    """Token-wise discrepancy between draft and reference, (B, h, w) on the fine token grid."""
    scale, grid = config.draft_scale, state.grid
    if config.verify_at == "full":
        large = drafts.upsample(draft, draft_grid, scale, grid)
        features = (adapter.features(pipe, tokens, grid) for tokens in (large, beside(large, state)))
        return discrepancy(*features, size=grid.shape)
    reference = beside(draft, state, scale)
    features = (adapter.features(pipe, tokens, draft_grid) for tokens in (draft, reference))
    covered = (draft_grid.height * scale, draft_grid.width * scale)  # a draft may reach beyond an odd grid
    return discrepancy(*features, size=covered)[:, : grid.height, : grid.width]


def beside(draft: Tensor, state: EditState, scale: int = 1) -> Tensor:
    """The reference at the draft's size (B, n, C), with the draft's own content where there is no reference.

    Decoder features see far: whatever else stood there would change those of the rest.
    """
    if state.covered is None:
        return drafts.shrink(state.aligned, state.grid, scale)[0]
    pixels = state.grid.geometry.pixels
    channels = draft.shape[2] // pixels
    share = state.covered.flatten()[None, :, None].expand(-1, -1, pixels).to(draft)  # of each pixel of a token
    reference, _ = drafts.shrink(state.aligned * share.repeat(1, 1, channels), state.grid, scale)
    share, _ = drafts.shrink(share, state.grid, scale)
    return reference + (1 - share.repeat(1, 1, channels)) * draft


def to_cells(score: Tensor) -> Tensor:
    """Largest score of each cell's tokens: (B, h, w) to (B, cells_h, cells_w)."""
    return F.max_pool2d(score[:, None], 2, ceil_mode=True)[:, 0]


def dilate(cells: Tensor, by: int) -> Tensor:
    """Grow a bool mask (B, h, w) by `by` cells on each side."""
    if by == 0:
        return cells
    return F.max_pool2d(cells[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0


def top_cells(score: Tensor, share: float = TOP_SHARE) -> Tensor:
    """The `share` of cells with the largest score, per sample."""
    cells = to_cells(score)
    count = max(1, round(share * cells[0].numel()))
    chosen = torch.zeros_like(cells, dtype=torch.bool).flatten(1)
    return chosen.scatter_(1, cells.flatten(1).topk(count, 1).indices, True).view_as(cells)


def select(
    adapter: Adapter, pipe: Any, state: EditState, draft: Tensor, draft_grid: TokenGrid, config: SpecEditConfig
) -> tuple[Tensor | None, Tensor]:
    """Score on the token grid (None for "uniform") and edited cells (B, cells_h, cells_w) bool.

    A sample whose score is not finite is edited as a whole, with a warning: nobody knows what its edit changes.
    """
    if config.selector == "uniform":
        return None, torch.zeros((state.batch, *state.grid.coarse().shape), dtype=torch.bool, device=state.device)
    if config.selector == "semantic":
        score = semantic_score(adapter, pipe, state, draft, draft_grid, config)
        chosen = to_cells(score) > config.threshold
    else:
        score = ranking_score(adapter, pipe, state, draft, draft_grid, config)
        chosen = top_cells(score)
    lost = not_finite(score)
    if bool(lost.any()):
        warnings.warn(
            f"the verification score is not finite (overflow in {_overflow(pipe, state, draft)}); editing the whole "
            "picture",
            stacklevel=2,
        )
    return score, dilate(chosen, config.dilation) | lost[:, None, None]


def ranking_score(
    adapter: Adapter, pipe: Any, state: EditState, draft: Tensor, draft_grid: TokenGrid, config: SpecEditConfig
) -> Tensor:
    """What "variance" and "edges" rank tokens by, (B, h, w) on the fine token grid."""
    large = drafts.upsample(draft, draft_grid, config.draft_scale, state.grid)
    if config.selector == "variance":
        return large.view(state.batch, *state.grid.shape, -1).var(-1)
    image = adapter.decode(pipe, state, large, "pt").float()
    score = F.adaptive_avg_pool2d(canny(image).float()[:, None], state.grid.shape)[:, 0]
    # Comparing with NaN finds no edge, which would hide it.
    return torch.where(not_finite(image)[:, None, None], torch.nan, score)


def not_finite(values: Tensor) -> Tensor:
    """(B,) bool: which samples of a score or picture (B, ...) hold something that is not finite."""
    return ~values.flatten(1).isfinite().all(1)


def _overflow(pipe: Any, state: EditState, draft: Tensor) -> str:
    """Which part of the model left the range of its dtype."""
    if bool(state.aligned.isfinite().all()) and not bool(draft.isfinite().all()):
        return f"the transformer, {state.conditioning.dtype}"
    return f"the autoencoder, {pipe.vae.dtype}"


def uniform_cells(grid: TokenGrid, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. 9: every `stride`-th cell of every `stride`-th row, (cells_h, cells_w) bool; 0 for none."""
    cells = torch.zeros(grid.coarse().shape, dtype=torch.bool, device=device)
    if stride:
        cells[::stride, ::stride] = True
    return cells

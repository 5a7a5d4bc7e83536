"""Which coarse cells are split into fine tokens (paper, sections 3.3.2 and 3.4.2).

"semantic" is the paper's verification. "edges" and "variance" are the selectors it compares with (RALU's Canny edges
of the decoded prediction, Fresco's channel variance); they rank cells and take a fixed share. "uniform" takes none
beyond the uniform coverage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import draft as drafts
from .canny import canny
from .config import SpecEditConfig
from .grid import TokenGrid
from .models.base import Adapter, EditState
from .placement import picture_cells

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
    share = state.covered.flatten()[None, :, None].expand(-1, -1, 4).to(draft)  # of each pixel of a token
    reference, _ = drafts.shrink(state.aligned * share.repeat(1, 1, draft.shape[2] // 4), state.grid, scale)
    share, _ = drafts.shrink(share, state.grid, scale)
    return reference + (1 - share.repeat(1, 1, draft.shape[2] // 4)) * draft


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
    """Score on the token grid (None for "uniform") and edited cells (B, cells_h, cells_w) bool."""
    if config.selector == "semantic":
        score = semantic_score(adapter, pipe, state, draft, draft_grid, config)
        return score, dilate(to_cells(score) > config.threshold, config.dilation)
    if config.selector == "uniform":
        return None, torch.zeros((state.batch, *state.grid.coarse().shape), dtype=torch.bool, device=state.device)
    large = drafts.upsample(draft, draft_grid, config.draft_scale, state.grid)
    if config.selector == "variance":
        score = large.view(state.batch, *state.grid.shape, -1).var(-1)
    else:
        image = adapter.decode(pipe, state, large, "pt").float()
        score = F.adaptive_avg_pool2d(canny(image).float()[:, None], state.grid.shape)[:, 0]
    return score, dilate(top_cells(score), config.dilation)


def uniform_cells(grid: TokenGrid, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. 9: every `stride`-th cell of every `stride`-th row, (cells_h, cells_w) bool; 0 for none."""
    cells = torch.zeros(grid.coarse().shape, dtype=torch.bool, device=device)
    if stride:
        cells[::stride, ::stride] = True
    return cells


def cells_of_mask(mask: Any, state: EditState) -> Tensor:
    """A caller's mask of the picture, of any size, as edited cells: a cell is edited where any pixel of it is nonzero.

    mask: PIL image, array or tensor: (H, W), (1, H, W), (B, H, W) or (B, 1, H, W); one for all samples or one each. An
    array may be a colour picture too, (H, W, 1), (H, W, 3) or (H, W, 4).

    Raises:
        TypeError, ValueError: another type or shape, values that are not finite, nothing that is nonzero.
    """
    if isinstance(mask, (list, tuple)):
        return _match_batch(torch.cat([_cells(m, state) for m in mask]) if mask else torch.zeros(0), state)
    shape = f", shape {tuple(mask.shape)}" if isinstance(mask, np.ndarray | Tensor) else ""
    return _match_batch(_cells(mask, state), state, shape)


def _cells(mask: Any, state: EditState) -> Tensor:
    """Those of one mask, or of several in one array or tensor, (n, cells_h, cells_w) bool."""
    if isinstance(mask, Image.Image):
        mask = _nonzero(mask)
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise TypeError(f"edit_mask: expected a PIL image, array or tensor, got {type(mask).__name__}")
    given = tuple(mask.shape)
    if isinstance(mask, np.ndarray):
        mask = _numbers(mask)
        # Not what could be masks of a few pixels, one for each sample.
        if mask.ndim == 3 and given[-1] in (1, 3, 4) and given[1] > 4 and given[0] not in (1, state.batch):
            mask = _any_colour(mask, alpha=given[-1] == 4)
    if mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0:
        raise ValueError(f"edit_mask: expected (H, W), (B, H, W) or (B, 1, H, W), got {given}")
    if mask.is_floating_point() and not bool(mask.isfinite().all()):
        raise ValueError("edit_mask: expected finite values, got NaN or infinity")
    wanted = (mask != 0).float().to(state.device)
    cells = picture_cells(wanted[:, 0], state.placement)
    if not bool(cells.flatten(1).any(1).all()):
        if bool(wanted.flatten(1).any(1).all()):
            raise ValueError("edit_mask: expected nonzero pixels on the output, got all of them where it is cropped")
        raise ValueError("edit_mask: expected some nonzero pixels, got an empty mask; there would be nothing to edit")
    return cells


def _numbers(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"edit_mask: expected an array of numbers or booleans, got dtype {array.dtype}")
    # torch takes neither another byte order nor negative strides.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _nonzero(picture: Image.Image) -> Tensor:
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    values = torch.from_numpy(np.array(picture))
    return values if values.ndim == 2 else _any_colour(values, alpha=picture.mode in ("LA", "RGBA"))


def _any_colour(values: Tensor, alpha: bool) -> Tensor:
    """(H, W) bool: where any colour of (H, W, C) is not zero. Where there is an alpha channel, it has to be too."""
    colours = values[..., :-1] if alpha else values
    found = (colours != 0).any(-1)
    return found & (values[..., -1] != 0) if alpha else found


def _match_batch(cells: Tensor, state: EditState, given: str = "") -> Tensor:
    """One for each sample, of one for all, for each of the pictures or prompts, or for each sample."""
    count, batch = len(cells), state.batch
    if count == batch:
        return cells
    if count == 1 or count == state.pictures:
        return cells.repeat(batch // count, 1, 1)
    if count == state.prompts:
        return cells.repeat_interleave(batch // count, 0)
    several = (("picture", state.pictures), ("prompt", state.prompts))
    wanted = [f"{n}, one for each {what}" for what, n in several if 1 < n < batch]
    wanted = " or ".join(["1 mask", *wanted, f"{batch}, one for each image"])
    raise ValueError(f"edit_mask: expected {wanted}, got {count}{given}")

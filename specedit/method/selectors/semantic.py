"""The paper's verification (section 3.3.2): decoder features of the draft against those of the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import SpecEditConfig
from ...layout import TokenGrid
from .. import draft as drafts
from ..adapter import EditState, Run
from . import Selector, register_selector, to_cells


@register_selector
class Semantic(Selector):
    """Cells whose features differ by more than `threshold`."""

    name = "semantic"
    needs_decoder = "features"
    verifies = True

    def score(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> Tensor:
        """Discrepancy between draft and reference, at the size that `verify_at` names."""
        adapter, pipe, state = run.adapter, run.pipe, run.state
        scale, grid = run.config.draft_scale, state.grid
        if run.config.verify_at == "full":
            large = drafts.upsample(draft, draft_grid, scale, grid)
            first, second = (adapter.features(pipe, tokens, grid) for tokens in (large, beside(large, state)))
            return discrepancy(first, second, grid.shape)
        first, second = adapter.features(pipe, draft, draft_grid), self.reference_features(run, draft, draft_grid)
        covered = (draft_grid.height * scale, draft_grid.width * scale)  # a draft may reach beyond an odd grid
        return discrepancy(first, second, covered)[:, : grid.height, : grid.width]

    def reference_features(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> list[Tensor]:
        """Of the reference at the draft's size: made once a run, unless the draft's own content is in it."""
        state = run.state
        if state.draft_features is not None:
            return state.draft_features
        found = run.adapter.features(run.pipe, beside(draft, state, run.config.draft_scale), draft_grid)
        if state.covered is None:
            state.draft_features = found
        return found

    def cells(self, score: Tensor, config: SpecEditConfig) -> Tensor:
        assert config.threshold is not None  # a configuration fills it in
        return to_cells(score) > config.threshold


def discrepancy(first: list[Tensor], second: list[Tensor], size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Eq. 6: squared distance of channel-normalised features, resized to `size` and averaged over layers.

    Features are (B, c, h, w); returns (B, *size) float32 in 0..4.
    """
    total = torch.zeros(())
    for a, b in zip(first, second, strict=True):
        distance = (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1, keepdim=True)
        resized = F.interpolate(distance, size=size, mode="bilinear", antialias=antialias, align_corners=False)
        total = total.to(resized) + resized[:, 0]
    return total / len(first)


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

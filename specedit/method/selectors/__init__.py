"""Which coarse cells are split into fine tokens (paper, sections 3.3.2 and 3.4.2).

One file a selector, each of which registers a `Selector`; the file bears the selector's name. "semantic" is the paper's
verification. "edges" and "variance" are the selectors it compares with (RALU's Canny edges of the decoded prediction,
Fresco's channel variance); they rank cells and take a fixed share. "uniform" takes none beyond the uniform coverage.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import SpecEditConfig
from ...layout import TokenGrid
from ...once import warn_caller
from ...registry import selectors
from ..adapter import Run

TOP_SHARE = 0.3  # of the cells: RALU's up_ratio for its 4x setting


class Selector(ABC):
    """Finds the coarse cells that an edit changes. An instance serves one verification and keeps nothing.

    Attributes:
        name: `SpecEditConfig(selector=name)`.
        needs_draft: whether it reads a draft. If not, none is made, and it selects no cells.
        needs_decoder: what it reads from the VAE's decoder: None, "features" (of draft and reference), or "picture"
            (the decoded draft). Errors and predictions of seconds depend on it.
        verifies: whether what it leaves out is known to be unchanged. Otherwise it only ranks cells, and those it
            leaves out are denoised without the reference's detail. One that verifies also verifies the coarse stage.
    """

    name: ClassVar[str] = ""
    needs_draft: ClassVar[bool] = True
    needs_decoder: ClassVar[Literal["features", "picture"] | None] = None
    verifies: ClassVar[bool] = False

    @abstractmethod
    def score(self, run: Run, draft: Tensor, draft_grid: TokenGrid) -> Tensor:
        """(B, h, w) float32 on the fine token grid: how much each token changes.

        draft: clean tokens (B, draft_grid.tokens, C). Numbers that are not finite make the whole sample edited.
        """

    def cells(self, score: Tensor, config: SpecEditConfig) -> Tensor:
        """(B, cells_h, cells_w) bool: the cells to edit, before dilation. By default the top 30 % of each sample."""
        return top_cells(score)


Found = TypeVar("Found", bound=type[Selector])


def register_selector(selector: Found) -> Found:
    """Make a selector known by its name: `SpecEditConfig(selector="name")`. Use it as a decorator.

    Args:
        selector: a class that derives from `Selector`, has a `name` and is made without arguments.

    Raises:
        TypeError: it is not such a class.
        ValueError: another selector has its name.
    """
    if not (isinstance(selector, type) and issubclass(selector, Selector)) or inspect.isabstract(selector):
        raise TypeError(f"selector: expected a class that derives from Selector and has a score, got {selector!r}")
    selectors.register(selector.name, selector)
    return selector


def reads_threshold(name: str) -> bool:
    """Whether the selector may choose cells by `config.threshold`, rather than by rank or not at all."""
    return selectors[name].cells is not Selector.cells


def to_cells(score: Tensor) -> Tensor:
    """Largest score of each cell's tokens: (B, h, w) to (B, cells_h, cells_w)."""
    return F.max_pool2d(score[:, None], 2, ceil_mode=True)[:, 0]


def to_tokens(cells: Tensor, grid: TokenGrid) -> Tensor:
    """What each cell says, for its tokens: (B, cells_h, cells_w) to (B, h, w)."""
    return cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : grid.height, : grid.width]


def dilate(cells: Tensor, by: int) -> Tensor:
    """Grow a bool mask (B, h, w) by `by` cells on each side."""
    if by == 0:
        return cells
    return F.max_pool2d(cells[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0


def top_cells(score: Tensor, share: float = TOP_SHARE) -> Tensor:
    """The `share` of cells with the largest score, per sample."""
    cells = to_cells(score)
    return highest(cells, max(1, round(share * cells[0].numel())))


def highest(cells: Tensor, count: int) -> Tensor:
    """(B, cells_h, cells_w) bool: the `count` cells of every sample with the largest score."""
    chosen = torch.zeros_like(cells, dtype=torch.bool).flatten(1)
    return chosen.scatter_(1, cells.flatten(1).topk(count, 1).indices, True).view_as(cells)


def select(run: Run, draft: Tensor, draft_grid: TokenGrid) -> tuple[Tensor | None, Tensor]:
    """Score on the token grid (None without a draft) and edited cells (B, cells_h, cells_w) bool.

    A sample whose score is not finite is edited as a whole, with a warning: what its edit changes is unknown.
    """
    config, state = run.config, run.state
    selector, cells = selectors[config.selector](), state.grid.coarse().shape
    if not selector.needs_draft:
        return None, torch.zeros((state.batch, *cells), dtype=torch.bool, device=state.device)
    score = selector.score(run, draft, draft_grid)
    _expect(f"selector {config.selector!r}: score", score, (state.batch, *state.grid.shape), torch.float32)
    chosen = selector.cells(score, config)
    _expect(f"selector {config.selector!r}: cells", chosen, (state.batch, *cells), torch.bool)
    lost = not_finite(score)
    if bool(lost.any()):
        warn_caller(
            f"the verification score is not finite (overflow in {_overflow(run, draft)}); editing the whole picture"
        )
    return score, dilate(chosen, config.dilation) | lost[:, None, None]


def _expect(what: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if got.shape != shape or got.dtype != dtype:
        raise ValueError(f"{what}: expected shape {shape} and {dtype}, got {tuple(got.shape)} and {got.dtype}")


def not_finite(values: Tensor) -> Tensor:
    """(B,) bool: which samples of a score or picture (B, ...) hold something that is not finite."""
    return ~values.flatten(1).isfinite().all(1)


def _overflow(run: Run, draft: Tensor) -> str:
    """Which part of the model left the range of its dtype."""
    if bool(run.state.aligned.isfinite().all()) and not bool(draft.isfinite().all()):
        return f"the transformer, {run.state.conditioning.dtype}"
    return f"the autoencoder, {run.pipe.vae.dtype}"


def uniform_cells(grid: TokenGrid, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. 9: every `stride`-th cell of every `stride`-th row, (cells_h, cells_w) bool; 0 for none."""
    cells = torch.zeros(grid.coarse().shape, dtype=torch.bool, device=device)
    if stride:
        cells[::stride, ::stride] = True
    return cells

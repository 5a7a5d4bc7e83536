"""Pure data about tokens: their positions, and which are coarse or fine.

A *fine* token is one packed 2 x 2 latent patch, or a single latent pixel where the model does not pack (the grid's
`geometry`). A *coarse cell* covers 2 x 2 fine tokens; where a grid has an odd side, the cells of its last row or column
cover fewer. Tokens are always listed row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import PACKED, TokenGeometry


@dataclass(frozen=True)
class TokenGrid:
    """A grid of `height` x `width` tokens, each of which holds the latent pixels that `geometry` says.

    Raises:
        ValueError: a side below 1.
        TypeError: `geometry` is not a TokenGeometry.
    """

    height: int
    width: int
    geometry: TokenGeometry = PACKED

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"token grid: expected at least 1 x 1, got {self.height} x {self.width}")
        if not isinstance(self.geometry, TokenGeometry):
            raise TypeError(f"geometry: expected TokenGeometry, got {type(self.geometry).__name__}")

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def grids(self) -> tuple[TokenGrid, ...]:
        """Itself, as the only one; a `GridSet` has several."""
        return (self,)

    def coarse(self, factor: int = 2) -> TokenGrid:
        """The grid of cells of `factor` x `factor` tokens, partial cells included."""
        return TokenGrid(-(-self.height // factor), -(-self.width // factor), self.geometry)

    def extended(self, rows: int, columns: int) -> TokenGrid:
        """The grid with `rows` and `columns` more; negative numbers take some away."""
        return replace(self, height=self.height + rows, width=self.width + columns)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """(N, 2) float32 row and column of every token."""
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in self.shape)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)

    def children(self, device: torch.device | str = "cpu") -> Tensor:
        """(cells, 4) int64: the fine tokens of every cell, row-major, as indices into the grid padded to even sides."""
        cells = self.coarse()
        rows, columns = torch.meshgrid(
            torch.arange(cells.height, device=device), torch.arange(cells.width, device=device), indexing="ij"
        )
        width = 2 * cells.width
        first = (2 * rows * width + 2 * columns).reshape(-1, 1)
        child = torch.arange(4, device=device)  # made on the device: a transfer would synchronise every step
        return first + child // 2 * width + child % 2

    def pad(self, tokens: Tensor, multiple: int = 2, mode: str = "replicate") -> Tensor:
        """Pad tokens (B, N, C) at the end to a grid whose sides are multiples of `multiple`.

        mode "replicate" repeats the last row and column (images); "circular" wraps around (noise, which must not
        repeat its neighbour).
        """
        below, right = -self.height % multiple, -self.width % multiple
        if not below and not right:
            return tokens
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *self.shape)
        while below or right:  # circular padding adds at most the side itself
            step = (min(below, image.shape[-2]), min(right, image.shape[-1]))
            image = F.pad(image, (0, step[1], 0, step[0]), mode=mode)
            below, right = below - step[0], right - step[1]
        return image.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class GridSet:
    """The grids of several pictures, whose tokens are listed one picture after the other."""

    grids: tuple[TokenGrid, ...]

    @property
    def tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) of all pictures as (B, n, C) of each."""
        split: tuple[Tensor, ...] = tokens.split([grid.tokens for grid in self.grids], 1)
        return split


@dataclass(frozen=True, eq=False)
class MixedLayout:
    """Which cells of a grid are split into fine tokens. Tokens are ordered [locked cells | fine tokens], each by rows.

    grid: the fine grid. expanded: (cells_h, cells_w) bool, True where a cell is split.

    The rest is for references, which use the output's cells. lead: how many leading rows and columns, 0 or 1 each, hold
    no tokens. origin: where the grid lies on the output's, in fine tokens.

    counted: fine tokens per step of `positions`, 1 or 2; None: 2 if all is coarse.
    """

    grid: TokenGrid
    expanded: Tensor
    lead: tuple[int, int] = (0, 0)
    origin: tuple[int, int] = (0, 0)
    counted: int | None = None

    def __post_init__(self) -> None:
        if tuple(self.expanded.shape) != self.grid.coarse().shape or self.expanded.dtype != torch.bool:
            raise ValueError(
                f"expanded: expected bool {self.grid.coarse().shape} for a grid of {self.grid.shape}, "
                f"got {self.expanded.dtype} {tuple(self.expanded.shape)}"
            )

    @classmethod
    def all_coarse(cls, grid: TokenGrid, device: torch.device | str = "cpu") -> MixedLayout:
        return cls(grid, torch.zeros(grid.coarse().shape, dtype=torch.bool, device=device))

    @classmethod
    def all_fine(cls, grid: TokenGrid, device: torch.device | str = "cpu") -> MixedLayout:
        return cls(grid, torch.ones(grid.coarse().shape, dtype=torch.bool, device=device))

    @cached_property
    def locked_cells(self) -> Tensor:
        """(n,) int64 indices of cells that stay one token."""
        return (~self.expanded).flatten().nonzero()[:, 0]

    @cached_property
    def expanded_cells(self) -> Tensor:
        """(m,) int64 indices of cells that are split."""
        return self.expanded.flatten().nonzero()[:, 0]

    @cached_property
    def _members(self) -> Tensor:
        """(cells, 4) bool: which children of every cell are tokens."""
        cells = self.grid.coarse()
        children = self.grid.children(self.expanded.device)
        rows, columns = children // (2 * cells.width), children % (2 * cells.width)
        inside = (rows < self.grid.height) & (columns < self.grid.width)
        return inside & (rows >= self.lead[0]) & (columns >= self.lead[1])

    def _children(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """For `cells` (n,): grid indices of the children that are tokens, and their slots among all 4 n; (m,) int64."""
        children = self.grid.children(self.expanded.device)[cells].flatten()
        width = 2 * self.grid.coarse().width
        flat = (children // width) * self.grid.width + children % width
        slots = self._members[cells].flatten().nonzero()[:, 0]
        return flat[slots], slots

    @cached_property
    def _fine_order(self) -> tuple[Tensor, Tensor]:
        places, slots = self._children(self.expanded_cells)
        order = places.argsort()
        return places[order], slots[order]

    @cached_property
    def _locked_order(self) -> tuple[Tensor, Tensor]:
        return self._children(self.locked_cells)

    @property
    def fine_tokens(self) -> Tensor:
        """(f,) int64 indices into the fine grid of the fine tokens."""
        return self._fine_order[0]

    @property
    def fine_slots(self) -> Tensor:
        """(f,) int64: index of each fine token among the 4 * m children of the expanded cells."""
        return self._fine_order[1]

    @cached_property
    def tokens(self) -> int:
        return len(self.locked_cells) + len(self.fine_tokens)

    @property
    def cells_of_tokens(self) -> Tensor:
        """(N,) int64: the cell in which each token lies."""
        rows, columns = self.fine_tokens // self.grid.width, self.fine_tokens % self.grid.width
        return torch.cat([self.locked_cells, rows // 2 * self.grid.coarse().width + columns // 2])

    @cached_property
    def is_coarse(self) -> bool:
        return len(self.expanded_cells) == 0

    @cached_property
    def is_fine(self) -> bool:
        return len(self.locked_cells) == 0

    @property
    def is_mixed(self) -> bool:
        return not (self.is_coarse or self.is_fine)

    @cached_property
    def area(self) -> Tensor:
        """(N,) float32: how many fine tokens each token covers, 1 to 4."""
        locked = self._members.sum(1)[self.locked_cells].float()
        return torch.cat([locked, torch.ones(len(self.fine_tokens), device=locked.device)])

    @property
    def picture(self) -> TokenGrid:
        """The grid without its lead: of the tokens that there are."""
        return self.grid.extended(-self.lead[0], -self.lead[1])

    @property
    def unit(self) -> int:
        """Fine tokens per step of `positions`: 2 if the output is all coarse, else 1."""
        return self.counted or (2 if self.is_coarse else 1)

    @cached_property
    def positions(self) -> Tensor:
        """(N, 2) float32 row and column of every token on the output's grid.

        An all-coarse grid has whole numbers of its own, as a small image does. A mixed grid uses fine units, with a
        locked cell at the centre of its tokens; with `counted=2` it stays a small image, whose split cells (i, j) hold
        tokens at (i, j) + {0, 1/2}.
        """
        device = self.expanded.device
        own = self._coarse_positions(device) if self.unit == 2 else self._fine_positions(device)
        if self.origin == (0, 0):
            return own
        return own + torch.tensor(self.origin, dtype=own.dtype, device=device) / self.unit

    def _coarse_positions(self, device: torch.device) -> Tensor:
        cells = self.grid.coarse().positions(device)
        if self.is_coarse:
            return cells
        return torch.cat([cells[self.locked_cells], self.grid.positions(device)[self.fine_tokens] / 2])

    def _fine_positions(self, device: torch.device) -> Tensor:
        fine = self.grid.positions(device)[self.fine_tokens]
        cells = self.grid.coarse().positions(device)[self.locked_cells]
        first, last = torch.tensor([self.lead, [self.grid.height - 1, self.grid.width - 1]], device=device)
        locked = (torch.maximum(2 * cells, first) + torch.minimum(2 * cells + 1, last)) / 2
        return torch.cat([locked, fine])

    def full_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) of this layout on the fine grid (B, grid.tokens, C): a locked cell's pixels are repeated."""
        batch, _, channels = tokens.shape
        split = len(self.locked_cells)
        out = tokens.new_empty(batch, self.grid.tokens, channels)
        if split:
            places, slots = self._locked_order
            out[:, places] = repeat_pixels(tokens[:, :split], self.grid.geometry).flatten(1, 2)[:, slots]
        out[:, self.fine_tokens] = tokens[:, split:]
        return out

    def from_full_grid(self, tokens: Tensor) -> Tensor:
        """The inverse of `full_grid`: keep fine tokens, average the pixels of locked cells."""
        fine = tokens[:, self.fine_tokens]
        if not len(self.locked_cells):
            return fine
        return torch.cat([mean_pixels(tokens, self.grid)[:, self.locked_cells], fine], 1)

    @property
    def layouts(self) -> tuple[MixedLayout, ...]:
        return (self,)


@dataclass(frozen=True, eq=False)
class LayoutSet:
    """The layouts of several pictures, whose tokens are listed one picture after the other."""

    layouts: tuple[MixedLayout, ...]

    @property
    def tokens(self) -> int:
        return sum(layout.tokens for layout in self.layouts)

    @property
    def is_fine(self) -> bool:
        return all(layout.is_fine for layout in self.layouts)

    @property
    def is_mixed(self) -> bool:
        return any(layout.is_mixed for layout in self.layouts)

    @property
    def area(self) -> Tensor:
        return torch.cat([layout.area for layout in self.layouts])


def cells_touched(mask: Tensor, grid: TokenGrid) -> Tensor:
    """(B, cells_h, cells_w) bool: cells that overlap a nonzero sample of `mask` (B, H, W) at any resolution."""
    tokens = F.adaptive_max_pool2d(mask[:, None], grid.shape)
    return F.max_pool2d(tokens, 2, ceil_mode=True)[:, 0] > 0


def repeat_pixels(tokens: Tensor, geometry: TokenGeometry = PACKED) -> Tensor:
    """Coarse tokens (B, M, C) to children (B, M, 4, C): every pixel fills the block of 2 x 2 that it stands for."""
    pixels = geometry.to_pixels(tokens)
    return geometry.from_blocks(pixels[..., None].expand(*pixels.shape, 4))


def mean_pixels(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """Fine tokens (B, N, C) to coarse ones (B, cells, C): every coarse pixel is the mean of its 2 x 2 latent pixels."""
    blocks = cell_blocks(tokens, grid)
    return grid.geometry.from_pixels(blocks.mean(-1))


def cell_blocks(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """Fine tokens (B, N, C) of an image as the 2 x 2 blocks (B, cells, pixels, channels, 4) of all cells' pixels.

    Beyond an odd side its last row or column repeats.
    """
    return blocks_of_padded(grid.pad(tokens), grid)


def blocks_of_padded(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """The same for tokens that are padded to even sides."""
    return grid.geometry.to_blocks(tokens[:, grid.children(tokens.device)])

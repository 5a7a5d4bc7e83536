"""Moves flow-matching states x_s = (1 - s) x0 + s e between resolutions.

After every move the noise is white again, at a known level. Derivations are in docs/method.md; tests repeat them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specedit_kernels import expand_tokens, gather_tokens

from ..geometry import PACKED, TokenGeometry
from ..layout import MixedLayout, TokenGrid, blocks_of_padded, cell_blocks
from .schedule import expanded_sigma


def haar(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal Haar transform of 2 x 2 blocks (..., 4): sum coefficient (...) and detail (..., 3).

    f00 = (c0 + c1 + c2 + c3) / 2, f01 = (c0 - c1 + c2 - c3) / 2, f10 = (c0 + c1 - c2 - c3) / 2,
    f11 = (c0 - c1 - c2 + c3) / 2.
    """
    f00, f01, f10, f11 = blocks.unbind(-1)
    detail = torch.stack([f00 - f01 + f10 - f11, f00 + f01 - f10 - f11, f00 - f01 - f10 + f11], -1) / 2
    return (f00 + f01 + f10 + f11) / 2, detail


def coarsen_noise(noise: Tensor, grid: TokenGrid) -> Tensor:
    """White noise (B, N, C) of a grid to white noise of its cells (B, cells, C): the sum coefficient of each 2 x 2.

    Unlike a mean it keeps the variance, and `cell_detail` holds exactly what it leaves out.
    """
    sums, _ = haar(noise_blocks(noise, grid))
    return grid.geometry.from_pixels(sums)


def noise_blocks(noise: Tensor, grid: TokenGrid) -> Tensor:
    """White noise (B, N, C) as `cell_blocks`, padded on an odd side so that the sum coefficients are white too.

    Packed, the blocks that are added lie outside the picture, where the noise of the first row or column repeats.
    Unpacked, an odd side cuts blocks in half. The missing half is the other times sqrt(2) - 1, which makes the sum
    coefficient (f00 + f01) / sqrt(2): of variance 1, and independent of all other blocks.
    """
    if grid.geometry.patch == 2:
        return blocks_of_padded(grid.pad(noise, mode="circular"), grid)
    cells = grid.coarse()
    scale = noise.new_ones(2 * cells.height, 2 * cells.width, 1)
    scale[grid.height :] *= math.sqrt(2) - 1
    scale[:, grid.width :] *= math.sqrt(2) - 1
    return blocks_of_padded(grid.pad(noise) * scale.flatten(0, 1), grid)


def cell_detail(tokens: Tensor, grid: TokenGrid, mode: str = "replicate") -> Tensor:
    """Haar detail (B, cells, pixels, channels, 3) of fine tokens (B, N, C), for each pixel of a coarse token.

    mode: "replicate" for an image, "circular" for noise, of which it is what `coarsen_noise` leaves out.
    """
    return haar(noise_blocks(tokens, grid) if mode == "circular" else cell_blocks(tokens, grid))[1]


def renoise(tokens: Tensor, sigma: float, target: float, noise: Tensor) -> Tensor:
    """Raise a state's noise from `sigma` to `target` >= sigma with fresh white noise.

    x' = k x + sqrt(s'^2 - (k s)^2) n with k = (1 - s') / (1 - s); for s' = 2s/(1+s) it is (x + sqrt(3) s n) / (1+s).
    """
    if not sigma <= target <= 1:
        raise ValueError(f"renoise: expected sigma <= target <= 1, got {sigma} and {target}")
    if sigma == 1:
        return tokens
    keep = (1 - target) / (1 - sigma)
    return keep * tokens + math.sqrt(max(0.0, target**2 - (keep * sigma) ** 2)) * noise


def refine_layout(
    tokens: Tensor,
    old: MixedLayout,
    new: MixedLayout,
    sigma: float,
    *,
    split_noise: Tensor,
    fresh_noise: Tensor,
    known_detail: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, float]:
    """Move a state to a finer layout: cells that are now split are expanded, all else is renoised to match.

    Args:
        tokens: (B, old.tokens, C) at noise level `sigma`.
        split_noise: (B, cells, pixels, channels, 3) white noise of the expansion, arranged as in `cell_detail`.
        fresh_noise: (B, grid.tokens, C) white noise on the fine grid, for tokens that keep their resolution.
        known_detail: like `split_noise`, Haar detail of cells whose content is known, 0 elsewhere.

    Returns:
        (B, new.tokens, C) and its noise level.

    Raises:
        ValueError: a split cell of `old` is coarse in `new`.
    """
    if torch.equal(old.expanded, new.expanded):
        return tokens, sigma
    if bool((old.expanded & ~new.expanded).any()):
        raise ValueError("refine_layout: expected only finer cells, but some split cells would become coarse")
    target = expanded_sigma(sigma)
    split = len(old.locked_cells)
    coarse, fine = tokens[:, :split], tokens[:, split:]
    cells = coarse.new_zeros(tokens.shape[0], old.grid.coarse().tokens, tokens.shape[2])
    cells[:, old.locked_cells] = coarse
    fresh_cells = coarsen_noise(fresh_noise, new.grid)
    locked = renoise(cells[:, new.locked_cells], sigma, target, fresh_cells[:, new.locked_cells])

    born = (new.expanded & ~old.expanded).flatten().nonzero()[:, 0]
    detail = None if known_detail is None else known_detail[:, born]
    parents = gather_tokens(cells, born, backend=backend)
    if sigma > 0:
        children = _noisy_children(parents, sigma, split_noise[:, born], detail, new.grid.geometry, backend)
    else:  # nothing is noise any more: the children are the parent and the detail that is known
        children = _clean_children(parents, detail, new.grid.geometry)
    on_grid = fine.new_zeros(tokens.shape[0], new.grid.tokens, tokens.shape[2])
    on_grid[:, old.fine_tokens] = renoise(fine, sigma, target, fresh_noise[:, old.fine_tokens])
    birth = MixedLayout(new.grid, new.expanded & ~old.expanded)
    on_grid[:, birth.fine_tokens] = gather_tokens(children.flatten(1, 2), birth.fine_slots, backend=backend)
    return torch.cat([locked, on_grid[:, new.fine_tokens]], 1), target


def _noisy_children(
    parents: Tensor, sigma: float, noise: Tensor, detail: Tensor | None, geometry: TokenGeometry, backend: str | None
) -> Tensor:
    if geometry.patch == 1:  # the kernels have no axis for the one pixel of a token
        noise, detail = noise.squeeze(2), None if detail is None else detail.squeeze(2)
    detail = None if detail is None else detail.contiguous()
    return expand_tokens(
        parents, sigma, noise=noise.contiguous(), detail=detail, patch=geometry.patch, backend=backend
    )[0]


def _clean_children(parents: Tensor, detail: Tensor | None, geometry: TokenGeometry = PACKED) -> Tensor:
    sums = 2 * geometry.to_pixels(parents)  # (B, M, pixels, channels)
    if detail is None:
        detail = sums.new_zeros(*sums.shape, 3)
    c1, c2, c3 = detail.unbind(-1)
    blocks = [sums + c1 + c2 + c3, sums - c1 + c2 - c3, sums + c1 - c2 - c3, sums - c1 - c2 + c3]
    return geometry.from_blocks(torch.stack(blocks, -1) / 2)

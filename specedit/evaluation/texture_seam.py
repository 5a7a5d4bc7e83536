"""Gradients across the border of a region, by the distance from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .regions import dilated

REACH = 8  # px on each side of the border
FEWEST = 16  # px that a distance needs to count
FAINT = 1 / 255  # gradient that is hardly visible


def profile(pictures: Tensor, region: Tensor) -> Tensor:
    """Logarithm of the mean gradient across the border at each distance from it, (n, distances).

    Args:
        pictures: (n, 3, h, w) float32 in 0..1.
        region: (h, w) bool. The picture's own edge is no border.

    Raises:
        ValueError: no border, or one of less than 16 px.
    """
    across = _across(pictures, _normal(region))
    rings = [ring for side in (region, ~region) for ring in _rings(side) if int(ring.sum()) >= FEWEST]
    if not rings:
        raise ValueError(f"region: expected a border of at least {FEWEST} px, got {int(region.sum())} px inside")
    return torch.stack([torch.log(across[:, ring].mean(1) + FAINT) for ring in rings], 1)


def _rings(side: Tensor) -> list[Tensor]:
    """The px of one side at 1, 2, ... px from the other, as masks (h, w)."""
    rings, reached = [], ~side
    for _ in range(REACH):
        grown = dilated(reached)
        rings.append(grown & ~reached)
        reached = grown
    return rings


def _normal(region: Tensor) -> Tensor:
    """Unit vectors (2, h, w), down and right, along which the distance from the border changes most."""
    inside = region[None, None].float()
    side = 2 * REACH + 1
    for _ in range(3):  # three box filters are nearly a Gaussian
        padded = F.pad(inside, (side // 2,) * 4, mode="replicate")
        inside = F.avg_pool2d(F.avg_pool2d(padded, (1, side), stride=1), (side, 1), stride=1)
    return F.normalize(_gradient(inside)[:, 0, 0], dim=0, eps=1e-9)


def _across(pictures: Tensor, normal: Tensor) -> Tensor:
    """Magnitude (n, h, w) of the gradient along the normal, over the three channels."""
    down, right = _gradient(pictures)
    return (down * normal[0] + right * normal[1]).square().sum(1).sqrt()


def _gradient(pictures: Tensor) -> Tensor:
    """Central differences (2, n, c, h, w), down and right."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    return (
        torch.stack([padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1], padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]])
        / 2
    )

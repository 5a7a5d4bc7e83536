"""Masks (h, w) bool made larger or smaller by squares."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dilated(mask: Tensor, by: int = 1) -> Tensor:
    """The px with one of the mask at most `by` px away in both directions."""
    return _along(_along(mask, by).T, by).T


def eroded(mask: Tensor, by: int = 1) -> Tensor:
    """The px whose surroundings of `by` px lie within the mask; outside the picture nothing does."""
    return ~dilated(F.pad(~mask, (by,) * 4, value=True), by)[by:-by, by:-by]


def _along(mask: Tensor, by: int) -> Tensor:
    """Dilated along the rows."""
    out = mask.clone()
    for step in range(1, min(by, mask.shape[1] - 1) + 1):
        out[:, step:] |= mask[:, :-step]
        out[:, :-step] |= mask[:, step:]
    return out

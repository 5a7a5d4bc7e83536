"""Pictures and regions as tensors, with errors that name what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PICTURE = "a picture (3, h, w) of floats in 0..1 or (h, w, 3) of uint8"


def as_picture(name: str, value: Any) -> Tensor:
    """A picture as (3, h, w) float32 in 0..1 on the CPU.

    Args:
        value: a tensor or an array, (3, h, w) floating in 0..1 or (h, w, 3) uint8, or a PIL image.

    Raises:
        TypeError: neither, or another dtype.
        ValueError: another shape, or values that are not in 0..1.
    """
    return _as_floats(name, value, PICTURE, 3)


def as_pictures(name: str, value: Any, like: Tensor) -> Tensor:
    """At least one picture of the size of `like`, as (n, 3, h, w) float32; `value`: as in `as_picture`, (n, ...)."""
    pictures = _as_floats(name, value, "pictures (n, 3, h, w) of floats in 0..1 or (n, h, w, 3) of uint8", 4)
    if not len(pictures) or pictures.shape[1:] != like.shape:
        raise ValueError(
            f"{name}: expected at least one picture of {_size(like)}, got {len(pictures)} of {_size(pictures)}"
        )
    return pictures


def as_region(value: Any, like: Tensor) -> Tensor:
    """A mask as (h, w) bool on the CPU, of the size of the picture `like`."""
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"region: expected a bool tensor or array (h, w), got {type(value).__name__}")
    region = _as_tensor(value)
    if region.dtype != torch.bool:
        raise TypeError(f"region: expected bool, got {str(region.dtype).removeprefix('torch.')}")
    if region.shape != like.shape[-2:]:
        raise ValueError(f"region: expected the picture's {_size(like)}, got {tuple(region.shape)}")
    return region


def _as_floats(name: str, value: Any, expected: str, dims: int) -> Tensor:
    if isinstance(value, Image.Image):
        value = np.asarray(value.convert("RGB"))
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    given = _as_tensor(value)
    of_bytes = given.dtype == torch.uint8
    if not (of_bytes or given.is_floating_point()):
        raise TypeError(f"{name}: expected {expected}, got {str(given.dtype).removeprefix('torch.')}")
    if given.ndim != dims or given.shape[-1 if of_bytes else -3] != 3:
        raise ValueError(f"{name}: expected {expected}, got the shape {tuple(given.shape)}")
    pictures = given.movedim(-1, -3).float() / 255 if of_bytes else given.float()
    if not of_bytes and not bool(((pictures >= 0) & (pictures <= 1)).all()):
        raise ValueError(f"{name}: expected values in 0..1, got some that are not, or not finite")
    return pictures.contiguous()


def _as_tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _size(pictures: Tensor) -> str:
    return f"{pictures.shape[-2]} x {pictures.shape[-1]} px"

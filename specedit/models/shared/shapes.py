"""How large a picture is, whatever it is given as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

# Widths of the embedded Kontext editor's two text encoders, which no released model has.
EMBEDDED_KONTEXT = dict(joint_attention_dim=192, pooled_projection_dim=128)


@dataclass(frozen=True)
class Shape:
    """Width and height in px, by the names that PIL images have for them."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def shapes_of(picture: Any) -> list[Shape]:
    """The shapes of a picture, or of each picture of a list.

    picture: PIL image, array (H, W, C) or (B, H, W, C), tensor (C, H, W) or (B, C, H, W), or a list of them.

    Raises:
        TypeError, ValueError: another type or shape, or an empty list.
    """
    if isinstance(picture, (list, tuple)):
        if not picture:
            raise ValueError("picture: expected at least one picture, got an empty list")
        return [_shape(one) for one in picture]
    return [_shape(picture)]


def _shape(picture: Any) -> Shape:
    if isinstance(picture, Image.Image):
        return Shape(*picture.size)
    if not isinstance(picture, (np.ndarray, Tensor)):
        raise TypeError(f"picture: expected a PIL image, array or tensor, got {type(picture).__name__}")
    shape, array = tuple(picture.shape), isinstance(picture, np.ndarray)
    if len(shape) not in (3, 4) or 0 in shape:
        layout = "(H, W, C)" if array else "(C, H, W)"
        raise ValueError(f"picture: expected {layout}, with or without a batch in front, got {shape}")
    height, width = shape[-3:-1] if array else shape[-2:]
    return Shape(width, height)


def whole(shape: Shape, multiple: int) -> tuple[int, int]:
    """Height and width down to multiples of `multiple` px; ValueError where nothing is left."""
    if min(shape.size) < multiple:
        raise ValueError(f"picture: expected at least {multiple} px a side, got {shape.width} x {shape.height}")
    return shape.height // multiple * multiple, shape.width // multiple * multiple


def is_embedded_kontext(pipe: Any) -> bool:
    """Whether a pipeline is the embedded Kontext editor, or one trained like it: they work at a picture's own size."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    return all(getattr(config, name, None) == width for name, width in EMBEDDED_KONTEXT.items())

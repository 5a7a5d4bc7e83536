"""What people upload and paint: pictures within limits, and the painter's layers as a mask."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..checks import integer
from ..io import pictures

MB, MEGAPIXEL = 10**6, 10**6
SMALLEST = 64  # px a side, below which a call runs stock
SCREEN = 1024  # px a side of what is painted on


@dataclass(frozen=True)
class Limits:
    """How large uploads may be.

    Args:
        bytes: of a picture's file.
        pixels: of a picture, known from its header before it is decoded.

    Raises:
        TypeError, ValueError: another number than a whole one above zero.
    """

    bytes: int = 32 * MB
    pixels: int = 40 * MEGAPIXEL

    def __post_init__(self) -> None:
        integer("bytes", self.bytes, 1)
        integer("pixels", self.pixels, 1)


def read(file: str | os.PathLike[str], limits: Limits) -> pictures.Picture:
    """The picture in an uploaded file, as a viewer shows it. Messages name the file without its folder.

    Raises:
        ValueError: a file or picture beyond the limits, a side below 64 px, or no picture that can be read.
    """
    path = Path(file)
    name = path.name
    if path.is_file() and (size := path.stat().st_size) > limits.bytes:
        raise ValueError(f"{name}: expected a file of at most {limits.bytes / MB:g} MB, got {size / MB:.1f}")
    width, height = pictures.size(path, name)
    if width * height > limits.pixels:
        most = f"at most {limits.pixels / MEGAPIXEL:g} megapixels"
        raise ValueError(f"{name}: expected {most}, got {width * height / MEGAPIXEL:.1f} ({width} x {height})")
    if min(width, height) < SMALLEST:
        raise ValueError(f"{name}: expected at least {SMALLEST} px a side, got {width} x {height}")
    return pictures.read(path, name)


def to_paint_on(picture: Image.Image | None) -> Image.Image | None:
    """The picture for the painter, which needs no more pixels than a screen has; the mask is resized anyway."""
    if picture is None or max(picture.size) <= SCREEN:
        return picture
    return ImageOps.contain(picture, (SCREEN, SCREEN))


def painted(drawing: Any, size: tuple[int, int]) -> Image.Image | None:
    """The mask that was painted, mode "L" with 0 and 255, at the picture's size (width, height); None if nothing was.

    drawing: what the painter gives: a dict whose "layers" are PIL pictures with alpha, or None.

    Raises:
        TypeError: something else.
    """
    layers = [] if drawing is None else drawing.get("layers") if isinstance(drawing, dict) else drawing
    if not isinstance(layers, list) or not all(isinstance(layer, Image.Image) for layer in layers):
        raise TypeError(f"mask: expected the painter's layers as PIL pictures, got {type(drawing).__name__}")
    mask = Image.new("L", size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BOX)
        mask.paste(255, mask=alpha.point(lambda value: 255 * (value > 0)))
    return mask if np.asarray(mask).any() else None

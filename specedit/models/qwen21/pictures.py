"""Pictures as the pipeline takes them: RGBA, each at the call's area in its own shape."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from diffusers import QwenImage21Pipeline
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as stock
from PIL import Image

from ..shared.images import given_list

RESOLUTION: int = inspect.signature(QwenImage21Pipeline.__call__).parameters["output_resolution"].default


def check_pictures(image: Any) -> list[Image.Image]:
    """The pictures of a call as RGBA.

    Raises:
        TypeError: something else than PIL images and uint8 arrays (H, W, 3 or 4).
        ValueError: an empty list, or a list within the list.
    """
    return [_picture(one) for one in given_list(image)]


def _picture(image: Any) -> Image.Image:
    if isinstance(image, list | tuple):
        raise ValueError("image: expected one flat list of pictures for all prompts, got a list within the list")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
            raise TypeError(f"image: expected a uint8 array (H, W, 3 or 4), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, a uint8 array or a list of them, got {type(image).__name__}")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def taken_size(shape: Any, resolution: int) -> tuple[int, int]:
    """Height and width at which a picture is taken. shape: what has its `width` and `height` in px."""
    width, height, _ = stock.calculate_dimensions(resolution * resolution, shape.width / shape.height)
    if min(width, height) < 1:
        raise ValueError(f"image: expected sides less unequal, got {shape.width} x {shape.height}")
    return height, width


def output_size(pipe: Any, call: dict[str, Any], images: list[Image.Image]) -> tuple[int, int]:
    """Height and width of the output: those asked for, else the last picture's, down to whole cells."""
    multiple, taken = 2 * pipe.vae_scale_factor, taken_size(images[-1], call["output_resolution"])
    sizes = []
    for name, default in zip(("height", "width"), taken, strict=True):
        side = call[name] or default
        if side < multiple:
            raise ValueError(f"{name}: expected at least {multiple} px, got {side}")
        sizes.append(side // multiple * multiple)
    return sizes[0], sizes[1]

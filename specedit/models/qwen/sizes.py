"""At which size the Qwen-Image edit pipelines take pictures, and which of several pictures is being edited."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from PIL import Image
from torch import Tensor

from ...layout import TokenGrid
from ..shared.shapes import Shape

EDIT_AREA = 1024 * 1024  # px to which QwenImageEditPipeline brings every picture
VISION_TOKEN = 28  # px a side of what the vision-language encoder makes one token


@dataclass(frozen=True)
class Pictures:
    """The input pictures at the sizes that the pipeline takes them.

    condition: for the vision-language encoder. reference: one (n, 3, 1, H, W) for each reference, for the VAE.
    aligned: which reference is the picture being edited.
    """

    condition: list[Image.Image]
    reference: list[Tensor]
    aligned: int = 0


def picture_size(pipe: Any, image: Image.Image | Shape) -> tuple[int, int]:
    """Width and height at which the pipeline takes a picture: a derived pipeline's `picture_size`, else 1 MP."""
    rule = getattr(pipe, "picture_size", None)
    return edit_size(edit, image) if rule is None else rule(image)


def edit_size(module: Any, image: Image.Image | Shape, area: int = EDIT_AREA) -> tuple[int, int]:
    """Width and height of a picture at `area` px, by the rule of the pipeline's module."""
    width, height = module.calculate_dimensions(area, image.width / image.height)[:2]
    if min(width, height) < 1:
        raise ValueError(f"image: expected sides less unequal, got {image.width} x {image.height}")
    return width, height


def whole_tokens(call: dict[str, Any], height: int, width: int, multiple: int) -> tuple[int, int]:
    """The asked height and width, or else the given ones, down to whole tokens."""
    height, width = call["height"] or height, call["width"] or width
    for name, side in (("height", height), ("width", width)):
        if side < multiple:
            raise ValueError(f"{name}: expected at least {multiple} px, got {side}")
    return height // multiple * multiple, width // multiple * multiple


def nearest_shapes(sizes: list[tuple[int, int]], grid: TokenGrid) -> list[int]:
    """Indices of the (height, width) whose aspect ratio is nearest to the grid's, several where these are equal."""
    distance = [abs(math.log(h * grid.width / (w * grid.height))) for h, w in sizes]
    return [i for i, d in enumerate(distance) if d <= min(distance) + 1e-9]


def shrink_picture(image: Image.Image, scale: int) -> Image.Image:
    """A picture at 1 / scale of its size, but no smaller than a vision token."""
    return image.resize(tuple(max(VISION_TOKEN, side // scale) for side in image.size), Image.Resampling.LANCZOS)

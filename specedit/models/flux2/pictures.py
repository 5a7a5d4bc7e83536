"""References as FLUX.2's pipelines take them: at most 1 MP each, cropped at the centre to whole tokens."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from ..shared.block_adapter import pixels_per_token
from ..shared.images import given_list, source_pictures
from ..shared.shapes import Shape, whole

Taken = tuple[list[Image.Image], list[Image.Image]]  # pictures being edited, and other references
MOST_PIXELS = 1024 * 1024  # a constant of the stock pipelines


def check_references(pipe: Any, image: Any) -> list[Image.Image]:
    """The references of a call; TypeError for anything else than PIL images, ValueError for sizes that stock refuses.

    The stock pipelines take pictures of any mode, and convert them to RGB.
    """
    images = given_list(image)
    for one in images:
        if not isinstance(one, Image.Image):
            raise TypeError(f"image: expected a PIL image or a list of them, got {type(one).__name__}")
        pipe.image_processor.check_image_input(one)
    return images


def taken_size(pipe: Any, shape: Any) -> tuple[int, int]:
    """Height and width at which the model takes a picture. shape: what has its `width` and `height` in px."""
    width, height = shape.width, shape.height
    if width * height > MOST_PIXELS:
        scale = (MOST_PIXELS / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    return whole(Shape(width, height), pixels_per_token(pipe))


def taken_picture(pipe: Any, image: Image.Image) -> Image.Image:
    """A picture as the model takes it, in RGB."""
    processor = pipe.image_processor
    if image.width * image.height > MOST_PIXELS:
        image = processor._resize_to_target_area(image, MOST_PIXELS)
    height, width = whole(Shape(*image.size), pixels_per_token(pipe))
    return processor.convert_to_rgb(processor.resize(image, height, width, resize_mode="crop"))


def model_input(pipe: Any, picture: Image.Image) -> Tensor:
    """A picture from `taken_picture` as a tensor (1, 3, H, W) for the autoencoder."""
    return pipe.image_processor.preprocess(picture, height=picture.height, width=picture.width, resize_mode="crop")


def source_of(pipe: Any, picture: Image.Image) -> Tensor:
    """The same picture (1, 3, H, W) in 0..1."""
    return source_pictures(pipe, [picture], picture.height, picture.width)


def output_size(pipe: Any, call: dict[str, Any], reference: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the output: those asked for, down to whole tokens; without any the first reference's."""
    multiple = pixels_per_token(pipe)
    for name in ("height", "width"):
        if call[name] is not None and call[name] < 0:
            raise ValueError(f"{name}: expected a number of at least 1, got {call[name]}")
    height, width = (int(asked or taken) for asked, taken in zip((call["height"], call["width"]), reference))
    if min(height, width) < multiple:
        raise ValueError(f"height, width: expected at least {multiple} px a side, got {height} x {width}")
    return height // multiple * multiple, width // multiple * multiple

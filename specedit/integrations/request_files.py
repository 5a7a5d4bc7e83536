"""Pictures and masks in a request: base64, a file in the folder that the server names, or what Python callers pass."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..io import pictures

FOLDER = "SPECEDIT_SERVER_FILES"
SIDE = 8192  # px: more is decoded for nobody
ROUNDING = 0.02  # how far a mask's proportions may be from the picture's, as a share
SHOWN = 24  # characters of a value in a message


def read_picture(value: Any, files: Path | None) -> Any:
    """An RGB picture of a request's `image`; what is no string is returned as it is.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(value, str):
        return value
    return pictures.read(_content("image", value, files), "image").image


def read_mask(value: Any, files: Path | None, image: Any = None) -> Any:
    """The mask of a request's `edit_mask`, as `pipe(edit_mask=...)` takes it.

    value: a string, a PIL image, an array or a tensor. image: the picture or pictures of the call; a PIL mask has the
    size of one of them, or its proportions.

    Raises:
        TypeError, ValueError: as `read_picture`.
    """
    from ..method import masks

    if isinstance(value, str):
        value = pictures.read_mask(_content("edit_mask", value, files), "edit_mask")[0]
    masks.read(value)  # raises for what is no mask, before the model runs
    if isinstance(value, Image.Image):
        _check_proportions(value, [one for one in _listed(image) if isinstance(one, Image.Image)])
    return value


def locate(name: str, text: str, files: Path | None) -> Path:
    """The file that a request names, inside the folder that the server names.

    Raises:
        ValueError: no such folder or file, or one outside.
    """
    if files is None:
        raise ValueError(
            f"{name}: expected base64; files are read where {FOLDER} names their folder, got {_short(text)}"
        )
    path = (files / text).resolve()
    if not path.is_relative_to(files.resolve()) or not path.is_file():
        raise ValueError(f"{name}: expected base64, or a file in the folder of {FOLDER}, got {_short(text)}")
    return path


def is_path(text: str) -> bool:
    """Whether a string names a file: base64 has no dot, and a file's name has one before its suffix."""
    return not text.startswith("data:") and "." in text


def _content(name: str, text: str, files: Path | None) -> io.BytesIO:
    """The picture file that a string holds or names, no larger than `SIDE`."""
    if is_path(text):
        file = io.BytesIO(locate(name, text, files).read_bytes())
    else:
        head, _, data = text.rpartition(",") if text.startswith("data:") else ("", "", text)
        try:
            file = io.BytesIO(base64.b64decode("".join(data.split()), validate=True))
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"{name}: expected base64 of a picture file, got {_short(head or text)}: {error}"
            ) from error
    width, height = pictures.size(file, name)
    if max(width, height) > SIDE:
        raise ValueError(f"{name}: expected at most {SIDE} px a side, got {width} x {height}")
    file.seek(0)
    return file


def _check_proportions(mask: Image.Image, images: list[Image.Image]) -> None:
    shares = [mask.width * image.height / (mask.height * image.width) for image in images]
    # A mask smaller than the picture has rounded sides.
    slack = ROUNDING + 1 / min(mask.size)
    if images and all(abs(share - 1) > slack for share in shares):
        sizes = " or ".join(dict.fromkeys(f"{image.width} x {image.height}" for image in images))
        raise ValueError(
            f"edit_mask: expected the picture's size, {sizes}, or its proportions, got {mask.width} x {mask.height}"
        )


def _listed(image: Any) -> Iterable[Any]:
    return image if isinstance(image, (list, tuple)) else [image]


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")

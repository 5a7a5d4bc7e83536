"""Load uncompressed YCbCr TIFFs, whose layout no version of Pillow names right in all cases."""

from __future__ import annotations

from typing import Any

from PIL import Image

PHOTOMETRIC, YCBCR = 262, 6  # TIFF tag and its value
# Pillow 12 takes three interleaved channels for four, and separate planes for RGB's. Pillow 13 knows no raw mode for
# separate planes. These modes read the bytes as they are.
RAW = {"RGBX": "RGB", "YCbCr": "RGB", "Y": "R", "C": "G", "b": "B"}


def load(image: Image.Image) -> None:
    """Decode an opened picture, in place, as `image.load` does."""
    if not _is_raw_ycbcr(image):
        image.load()
        return
    opened: Any = image
    opened._mode = "RGB"
    opened.tile = [tile._replace(args=(RAW.get(tile.args[0], tile.args[0]), *tile.args[1:])) for tile in opened.tile]
    image.load()
    image.paste(Image.merge("YCbCr", image.split()).convert("RGB"))


def _is_raw_ycbcr(image: Image.Image) -> bool:
    tags, tiles = getattr(image, "tag_v2", {}), getattr(image, "tile", ())
    if image.format != "TIFF" or tags.get(PHOTOMETRIC) != YCBCR:
        return False
    return bool(tiles) and all(tile[0] == "raw" and hasattr(tile, "_replace") for tile in tiles)

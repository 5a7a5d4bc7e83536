"""Convert Pillow modes and colour profiles to 8-bit sRGB and a separate alpha channel."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
RANGES = (1.0, 255.0, 65535.0)  # white of float pictures; black is 0
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
SCREEN_GAMMA = 2.2  # the display that PNG's gamma assumes
SAME = 2  # levels; a profile this close to sRGB leaves the pixels unchanged
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """An 8-bit sRGB picture, its alpha, and notes.

    Returns:
        image: mode "RGB", the colours before compositing, also of transparent pixels.
        alpha: mode "L", or None if every pixel is opaque.
        notes: sentences for the user about what could not be converted.

    Raises:
        ValueError: values in an unknown range, or an unknown mode.
    """
    profile = image.info.get("icc_profile")
    colours, alpha = _split(image)
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    if profile:
        try:
            return _by_profile(colours, profile), alpha, ()
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            note = f"its colour profile cannot be used, so its colours are taken as sRGB: {error}"
            return _plain(colours), alpha, (note,)
    colours = _plain(colours)
    gamma = image.info.get("gamma")
    if gamma and "srgb" not in image.info and abs(gamma * SCREEN_GAMMA - 1) > 0.05:
        colours = colours.point([round(255 * (i / 255) ** (1 / (gamma * SCREEN_GAMMA))) for i in range(256)] * 3)
    return colours, alpha, ()


def on_white(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """An RGB picture composited on white."""
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def off_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """The RGBA picture that gives `image` on white; fully transparent pixels are white."""
    share = np.asarray(alpha, np.float32)[:, :, None] / 255
    colours = 255 - (255 - np.asarray(image, np.float32)) / np.maximum(share, 1 / 255)
    colours = np.where(share > 0, colours.clip(0, 255).round(), 255).astype(np.uint8)
    return Image.fromarray(np.concatenate([colours, np.asarray(alpha)[:, :, None]], 2))


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colours in their own colour space ("L", "RGB", "CMYK", ...), and the alpha."""
    if image.mode in GREY_16:
        return _from_16_bit(image)
    if image.mode == "F":
        return _from_float(image), None
    if image.mode in ("LA", "La"):
        grey, alpha = (image if image.mode == "LA" else image.convert("LA")).split()
        return grey, alpha
    if image.mode in ALPHA or image.info.get("transparency") is not None or _palette_has_alpha(image):
        colours = "L" if image.mode in ("1", "L") else "RGB"
        image = image.convert("RGBA")
        return image.convert(colours), image.getchannel("A")
    if image.mode in ("1", "P"):
        return image.convert("L" if image.mode == "1" else "RGB"), None
    return image, None


def _palette_has_alpha(image: Image.Image) -> bool:
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS_PER_SAMPLE) or (16,))
    white = 2 ** min(bits, 16) - 1  # 12-bit TIFFs open in a 16-bit mode
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > white:
        raise ValueError(f"expected whole numbers in 0..{white}, got values from {low} to {high}")
    clear = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values  # Pillow inverts 8-bit pictures only
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8)), alpha


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    white = next((white for white in RANGES if high <= white), None)
    # A picture below a sixteenth of a range was hardly meant to use it.
    if not low >= 0 or white is None or (white > 1 and high < white / 16):
        ranges = ", ".join(f"0..{white:g}" for white in RANGES)
        raise ValueError(f"expected floating point values in one of {ranges}, got values from {low:g} to {high:g}")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _converted(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, _srgb(), outputMode="RGB")
    assert converted is not None  # None is for conversions in place
    return converted


def _plain(image: Image.Image) -> Image.Image:
    """An 8-bit picture without a profile as RGB."""
    if image.mode == "LAB":
        return _converted(image, ImageCms.createProfile("LAB"))
    return image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space == "RGB":
        return _from_rgb(image.convert("RGB"), opened)
    expected = {"GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
    if image.mode != expected:
        raise ValueError(f"it is for {space}, and the picture is {image.mode}")
    return _converted(image, opened)


def _from_rgb(image: Image.Image, profile: Any) -> Image.Image:
    """Convert to sRGB; leave the pixels alone if the profile is sRGB, because conversion rounds."""
    transform = ImageCms.buildTransform(profile, _srgb(), "RGB", "RGB")
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    if np.abs(converted.astype(int) - colours).max() <= SAME:
        return image
    moved = ImageCms.applyTransform(image, transform)
    assert moved is not None
    return moved


def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")

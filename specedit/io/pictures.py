"""Read pictures as a viewer shows them; write them completely or not at all."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from . import tiff
from .files import replacing
from .pixels import off_white, on_white, to_srgb

ALPHA_FORMATS = ("PNG", "WEBP", "TIFF", "TGA", "JPEG2000", "AVIF", "HEIF", "DDS")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
ONE_PICTURE = ("MPO", "PSD")  # further frames are a preview or layers
PNG_DEPTH = 24  # offset of a PNG's bit depth
OTHER_SIZES = ("ICO", "ICNS")  # icons only
ORIENTATION = 0x0112  # EXIF tag
TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)  # fmt: skip
SIDEWAYS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # swap width and height


class PictureError(ValueError):
    """A picture that cannot be read or written: one line that names the file."""


@dataclass(frozen=True)
class Picture:
    """A picture as a viewer shows it on white.

    image: mode "RGB", upright, sRGB. alpha: mode "L" of the same size, or None if the picture is opaque. notes:
    sentences for the user, such as which of several frames was read.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    notes: tuple[str, ...] = ()


def read(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Picture:
    """The picture in a file, as a viewer shows it.

    16-bit grey and floating-point values are scaled. Floats are in 0..1, 0..255 or 0..65535, the first range that holds
    them. Colour profiles are converted to sRGB. Transparent parts are white.

    Args:
        file: path, or an open binary file.
        name: for messages, by default its path.

    Raises:
        PictureError: missing, damaged, not a picture, or with values in no known range.
    """
    name = str(file) if name is None else name
    opened, notes = _open(file, name)
    try:
        image, alpha, more = to_srgb(opened)
        turn = _turn(opened)
        if turn is not None:
            image, alpha = image.transpose(turn), None if alpha is None else alpha.transpose(turn)
        image.info = {}  # otherwise the old profile would be written too
        return Picture(on_white(image, alpha), alpha, notes + tuple(f"{name}: {note}" for note in more))
    except MemoryError:
        raise
    except Exception as error:
        raise PictureError(f"{name}: {_line(error)}") from error


def read_mask(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture for `edit_mask`, upright and otherwise unchanged, and notes. As `read` otherwise."""
    image, notes = _open(file, str(file) if name is None else name)
    turn = _turn(image)
    return image if turn is None else image.transpose(turn), notes


def size(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Width and height of the picture in a file, upright. Only its header is read. As `read` otherwise."""
    with _stream(file, str(file) if name is None else name) as stream:
        image = _identify(stream)
        width, height = image.size
        return (height, width) if _turn(image) in SIDEWAYS else (width, height)


def check_target(path: str | os.PathLike[str]) -> None:
    """Check before any work that `write` can write an RGB picture to `path`.

    Raises:
        PictureError: a suffix that Pillow cannot write here, a folder, or a folder without permission.
    """
    path = Path(path)
    try:
        _check_format(path)
        if path.is_dir():
            raise PictureError(f"{path}: expected a picture file to write, got a folder")
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise PictureError(f"{path}: expected a file that can be written, got one that cannot")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise PictureError(f"{path}: expected a folder that can be written to, got {folder}")
    except OSError as error:  # such as a name that is too long
        raise PictureError(f"{path}: {_line(error)}") from error


def write(image: Image.Image, path: str | os.PathLike[str], *, alpha: Image.Image | None = None) -> tuple[str, ...]:
    """Write a picture to a temporary file and move it into place, so that a failure leaves the old file.

    Args:
        image: mode "RGB", sRGB, on white.
        path: its suffix selects the format; missing folders are created.
        alpha: mode "L", of the edited picture; resized to the image's size.

    Returns:
        Notes for the user.

    Raises:
        PictureError: as `check_target`, or writing fails.
    """
    check_target(path)
    form = _check_format(Path(path))
    notes: tuple[str, ...] = ()
    if alpha is not None and form not in ALPHA_FORMATS:
        notes = (f"{path}: {form} holds no transparency, so the picture lies on white",)
    elif alpha is not None:
        image = off_white(image, alpha if alpha.size == image.size else alpha.resize(image.size))
        notes = (f"{path}: transparent where the input is, so an edit there does not show",)
    image = image.copy()
    image.info = {}  # otherwise Pillow would write its profile
    try:
        with replacing(path) as part, part.open("xb") as file:
            image.save(file, format=form)
    except (OSError, ValueError) as error:
        raise PictureError(f"{path}: cannot be written: {_line(error)}") from error
    return notes


def _check_format(path: Path) -> str:
    """The format of `path`; PictureError if Pillow cannot write RGB pictures in it."""
    form = Image.registered_extensions().get(path.suffix.lower())
    try:
        if form not in Image.SAVE or form in OTHER_SIZES:
            raise OSError("no such format")
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=form)  # some formats have no colours or no codec here
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(f"expected a picture file such as {path.stem or 'edit'}.png, got {path}") from error
    return form


def _open(file: Any, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame, decoded, and notes."""
    with _stream(file, name) as stream:
        image = _identify(stream)
        frames = 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)
        tiff.load(image)
        _scale_key(image, stream)
        return image, (f"{name}: the first of {frames} frames is read",) if frames > 1 else ()


@contextmanager
def _stream(file: Any, name: str) -> Iterator[BinaryIO]:
    """An open file, whose errors are raised as PictureError."""
    try:
        # Pass a stream: given a path, Pillow maps uncompressed TIFFs into memory and misreads rotated ones.
        with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large or unusual pictures that can be read
            yield stream
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{name}: expected a picture file, got one that does not exist") from error
    except IsADirectoryError as error:
        raise PictureError(f"{name}: expected a picture file, got a folder") from error
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise PictureError(f"{name}: expected a picture that can be read: {_line(error)}") from error


def _identify(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream)
    except UnidentifiedImageError as error:
        brand = _brand(stream)
        if brand not in HEIF_BRANDS + AVIF_BRANDS:
            what = "a kind of file that Pillow does not know" if brand is not None else "the file is empty"
            raise OSError(what) from error
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            cure = "pip install pillow-heif" if brand in HEIF_BRANDS else 'pip install "pillow>=11.3"'
            raise OSError(f"{'HEIC' if brand in HEIF_BRANDS else 'AVIF'} needs another reader; {cure}") from error
        register_heif_opener()
        return Image.open(stream)


def _scale_key(image: Image.Image, stream: BinaryIO) -> None:
    """Scale a PNG's transparent colour to 8 bits, as Pillow scales the pixels."""
    key = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(key, (int, tuple)):
        return
    stream.seek(PNG_DEPTH)
    depth = stream.read(1)[0]
    if isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the picture upright, from its EXIF orientation."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF
        return None


def _brand(stream: BinaryIO) -> bytes | None:
    """The brand in an ISO media file's first box; b"" for other files, None for empty ones."""
    stream.seek(0)
    first = stream.read(12)
    stream.seek(0)
    if not first:
        return None
    return first[8:12] if first[4:8] == b"ftyp" else b""


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())

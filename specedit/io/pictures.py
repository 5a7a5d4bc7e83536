"""Picture files: read as a viewer shows them, and written whole or not at all."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from .pixels import off_white, on_white, to_srgb

ALPHA_FORMATS = ("PNG", "WEBP", "TIFF", "TGA", "JPEG2000", "AVIF", "HEIF", "DDS")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
ONE_PICTURE = ("MPO", "PSD")  # whose further frames are a camera's preview and the layers
PNG_DEPTH = 24  # where a PNG says how many bits a value has
OTHER_SIZES = ("ICO", "ICNS")  # which hold icons only
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


class PictureError(ValueError):
    """A picture that cannot be read or written: one line that names the file."""


@dataclass(frozen=True)
class Picture:
    """A picture as a viewer shows it on white.

    image: mode "RGB", upright, sRGB. alpha: mode "L" of the same size, or None where the picture is opaque. notes:
    sentences for the user, such as which of several frames this is.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    notes: tuple[str, ...] = ()


def read(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Picture:
    """The picture in a file, as a viewer shows it.

    Grey of 16 bits and floating point values are scaled: floats in 0..1, 0..255 or 0..65535, whichever is the first to
    hold them. A colour profile is converted to sRGB, and what is transparent lies on white.

    Args:
        file: path, or an open binary file.
        name: what messages call it, by default its path.

    Raises:
        PictureError: missing, damaged, not a picture, or with values that do not say how bright they are.
    """
    name = str(file) if name is None else name
    opened, notes = _open(file, name)
    try:
        image, alpha, more = to_srgb(opened)
        turn = _turn(opened)
        if turn is not None:
            image, alpha = image.transpose(turn), None if alpha is None else alpha.transpose(turn)
        image.info = {}  # or writing it would take the old profile along
        return Picture(on_white(image, alpha), alpha, notes + tuple(f"{name}: {note}" for note in more))
    except MemoryError:
        raise
    except Exception as error:
        raise PictureError(f"{name}: {_line(error)}") from error


def read_mask(file: str | os.PathLike[str]) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture for `edit_mask`, upright and otherwise as it is in the file, and notes. Errors as those of `read`."""
    image, notes = _open(file, str(file))
    turn = _turn(image)
    return image if turn is None else image.transpose(turn), notes


def check_target(path: str | os.PathLike[str]) -> None:
    """Before any work: whether `write` could write an RGB picture there.

    Raises:
        PictureError: a suffix of no format that Pillow can write here, a folder, or a place without permission.
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
    except OSError as error:  # a name that is too long, for instance
        raise PictureError(f"{path}: {_line(error)}") from error


def write(image: Image.Image, path: str | os.PathLike[str], *, alpha: Image.Image | None = None) -> tuple[str, ...]:
    """Write a picture beside its place and move it there, so that a failure leaves the old file.

    Args:
        image: mode "RGB", sRGB, on white.
        path: its suffix says the format; missing folders are made.
        alpha: mode "L", of the picture that was edited; brought to the image's size.

    Returns:
        Notes for the user.

    Raises:
        PictureError: as `check_target`, and where writing fails.
    """
    check_target(path)
    place, form = Path(os.path.realpath(path)), _check_format(Path(path))
    notes: tuple[str, ...] = ()
    if alpha is not None and form not in ALPHA_FORMATS:
        notes = (f"{path}: {form} holds no transparency, so the picture lies on white",)
    elif alpha is not None:
        image = off_white(image, alpha if alpha.size == image.size else alpha.resize(image.size))
        notes = (f"{path}: transparent where the input is, so an edit there does not show",)
    part = place.with_name(f".specedit-{secrets.token_hex(6)}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        image = image.copy()
        image.info = {}  # Pillow would write a profile that is in there
        with part.open("xb") as file:
            image.save(file, format=form)
        if place.exists():
            shutil.copymode(place, part)
        os.replace(part, place)
    except (OSError, ValueError) as error:
        raise PictureError(f"{path}: cannot be written: {_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return notes


def _check_format(path: Path) -> str:
    """The format that `path` is to be written in; PictureError where Pillow cannot write RGB pictures in it."""
    form = Image.registered_extensions().get(path.suffix.lower())
    try:
        if form not in Image.SAVE or form in OTHER_SIZES:
            raise OSError("no such format")
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=form)  # some formats hold no colours, or lack their codec
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(f"expected a picture file such as {path.stem or 'edit'}.png, got {path}") from error
    return form


def _open(file: Any, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame, decoded, and notes."""
    try:
        # Pillow gets no path: it would map uncompressed TIFFs into memory, and misread those that lie on their side.
        with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pictures that are large or oddly written, yet can be read
            image = _identify(stream)
            frames = 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)
            image.load()
            _scale_key(image, stream)
            return image, (f"{name}: the first of {frames} frames is read",) if frames > 1 else ()
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{name}: expected a picture file, got one that does not exist") from error
    except IsADirectoryError as error:
        raise PictureError(f"{name}: expected a picture file, got a folder") from error
    except Exception as error:  # Pillow's readers raise errors of any kind for damaged files
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
    """Bring the transparent colour of a PNG to 8 bits, as Pillow brought the pixels."""
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
    """What brings the picture upright: cameras write beside the pixels which side is up."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not say
        return None


def _brand(stream: BinaryIO) -> bytes | None:
    """The brand in an ISO media file's first box, b"" of other files, and None of empty ones."""
    stream.seek(0)
    first = stream.read(12)
    stream.seek(0)
    if not first:
        return None
    return first[8:12] if first[4:8] == b"ftyp" else b""


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())

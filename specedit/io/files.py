"""Write files completely or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file next to `path`, with its suffix; it replaces `path` if the block succeeds.

    Missing folders are created. Links are followed. Anything but a regular file, such as /dev/stdout, is written
    directly.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        yield place
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".specedit-{secrets.token_hex(6)}.part{place.suffix}")
    try:
        yield part
        if place.exists():
            shutil.copymode(place, part)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_writable(name: str, path: Path) -> None:
    """Check before any work that `path` is writable; `name` is the option in messages.

    Raises:
        ValueError: a folder, a protected file, or a folder without permission.
    """
    if path.is_dir():
        raise ValueError(f"{name}: expected a file to write, got the folder {path}")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise ValueError(f"{name}: expected a file that can be written, got {path}, which is protected")
        if not path.is_file():
            return
    folder = Path(os.path.realpath(path)).parent
    check_folder(name, folder)


def check_folder(name: str, folder: Path) -> None:
    """Check before any work that files can be written to `folder`, which need not exist.

    Raises:
        ValueError: it, or a folder above it, is a file or cannot be written to.
    """
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not there.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: expected a folder that can be written to, got {there}")


def same(first: Path, second: Path) -> bool:
    """Whether two paths are the same file, however they are spelled."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    return first.exists() and second.exists() and first.samefile(second)

"""Check the files that `specedit edit` reads and writes, before any work."""

from __future__ import annotations

import itertools
from pathlib import Path

from ..io.files import check_writable, same
from .errors import CLIError


def check_files(image: Path, mask: Path | None, out: Path, figure: Path | None, compare: Path | None) -> None:
    """Check that inputs exist, and that outputs are writable and distinct.

    `out` may be `image`, which is then replaced; every other pair must differ.

    Raises:
        CLIError, ValueError: naming the option.
    """
    for name, path in (("image", image), ("--mask", mask)):
        if path is not None and not path.is_file():
            found = "which is a folder" if path.is_dir() else "which does not exist"
            raise CLIError(f"{name}: expected a picture file, got {path}, {found}")
    for name, path in (("--out", out), ("--figure", figure), ("--compare", compare)):
        if path is not None:
            check_writable(name, path)
    named = {"image": image, "--mask": mask, "--out": out, "--figure": figure, "--compare": compare}
    given = [(name, path) for name, path in named.items() if path is not None]
    for (first, one), (second, other) in itertools.combinations(given, 2):
        if {first, second} not in ({"image", "--out"}, {"image", "--mask"}) and same(one, other):
            raise CLIError(f"{second}: expected another file than {first}, got {other} for both")


def check_formats(out: Path, figure: Path | None, compare: Path | None) -> None:
    """Check that the libraries can write the formats that the suffixes name.

    Raises:
        ValueError: naming the path.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    from ..io import pictures

    for path in (out, compare):
        if path is not None:
            pictures.check_target(path)
    if figure is not None and figure.suffix.lower().lstrip(".") not in FigureCanvasBase.get_supported_filetypes():
        raise CLIError(f"expected a picture file such as {figure.stem}.png, got {figure}")

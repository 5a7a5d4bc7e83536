"""Lay this package out as a kernel package that kernel-builder can build for the Hub.

    python -m specedit_kernels.hub_layout FOLDER

FOLDER gets build.toml and torch-ext/specedit_kernels/ with the Python sources and the launch parameters. The package
imports relatively and needs torch alone, so it also works as it lies there, under any name.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def lay_out(folder: Path) -> list[Path]:
    """Copy build.toml and the sources to `folder`, which must be new or empty; return the files written.

    Raises:
        ValueError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"expected a new or empty folder, got {folder} with files in it")
    package = Path(__file__).parent
    target = folder / "torch-ext" / "specedit_kernels"
    sources = sorted([*package.rglob("*.py"), *package.rglob("*.json")])
    pairs = [(package / "build.toml", folder / "build.toml")]
    pairs += [(source, target / source.relative_to(package)) for source in sources]
    for source, copy in pairs:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return [copy for _, copy in pairs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specedit_kernels.hub_layout", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        files = lay_out(options.folder)
    except ValueError as error:
        print(f"specedit_kernels.hub_layout: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(files)} files to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

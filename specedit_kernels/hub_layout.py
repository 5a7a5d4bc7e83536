"""Lay this package out as a kernel package that kernel-builder can build for the Hub.

    python -m specedit_kernels.hub_layout FOLDER

FOLDER gets build.toml, torch-ext/specedit_kernels/ with the Python sources and the launch parameters, and the same as
builds for `kernels.get_local_kernel`, which need no compiler. The package imports relatively and needs torch alone, so
it also works as it lies there, under any name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

BACKENDS = ("cpu", "cuda")


def metadata(backend: str) -> dict[str, Any]:
    """What `kernels` reads of a build. The id names the loaded module."""
    general = tomllib.loads((Path(__file__).parent / "build.toml").read_text())["general"]
    name, version = general["name"], general["version"]
    named = {"name": name, "id": f"{name.replace('-', '_')}_{backend}_{version}", "version": version}
    return named | {"license": general["license"], "python-depends": [], "backend": {"type": backend}}


def lay_out(folder: Path) -> list[Path]:
    """Write build.toml, the sources and the builds to `folder`, which must be new or empty; return the files written.

    Raises:
        ValueError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"expected a new or empty folder, got {folder} with files in it")
    package = Path(__file__).parent
    builds = {backend: folder / "build" / f"torch-{backend}" for backend in BACKENDS}
    sources = sorted([*package.rglob("*.py"), *package.rglob("*.json")])
    pairs = [(package / "build.toml", folder / "build.toml")]
    for target in (folder / "torch-ext" / "specedit_kernels", *builds.values()):
        pairs += [(source, target / source.relative_to(package)) for source in sources]
    for source, copy in pairs:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    written = [copy for _, copy in pairs]
    for backend, build in builds.items():
        (build / "metadata.json").write_text(json.dumps(metadata(backend), indent=1) + "\n")
        written.append(build / "metadata.json")
    return written


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

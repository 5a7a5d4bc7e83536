"""Times the README's commands from a shallow clone to the demo, and measures what they leave on disk.

    python scripts/measure_setup.py [--out FILE]

Everything happens in a temporary folder. Only pip uses the network. The row of a step holds its command, seconds and
the bytes that it added to the disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from specedit.evaluation import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "setup.json"


def commands(python: str, repository: str) -> Iterator[tuple[str, list[str]]]:
    """The README's steps in order, each with the command line that runs it in the folder that is measured."""
    yield "clone", ["git", "clone", "--quiet", "--depth", "1", repository, "specedit"]
    yield "venv", [python, "-m", "venv", "specedit/.venv"]
    pip = ["specedit/.venv/bin/pip", "install", "--quiet", "--no-cache-dir", "-c", "specedit/constraints.txt"]
    yield "install", [*pip, "./specedit"]
    yield "demo", ["specedit/.venv/bin/specedit", "demo", "--out", "specedit/demo"]


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, links left out."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def measure(
    steps: Iterator[tuple[str, list[str]]], folder: Path, names: dict[str, str] | None = None
) -> Iterator[dict]:
    """Run each step in `folder`, which must exist, and yield its row. names: of this machine's paths, for the rows."""
    names = names or {}
    held = size_of(folder)
    for name, command in steps:
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=folder, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        held, before = size_of(folder), held
        words = (names.get(word, word) for word in command)
        yield {"step": name, "command": " ".join(words), "seconds": seconds, "bytes": held - before}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes the environment")
    args = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        repository = f"file://{ROOT}"
        names = {repository: "REPOSITORY", args.python: "python3"}
        rows = list(measure(commands(args.python, repository), Path(folder), names))
    results.write(args.out, "python scripts/measure_setup.py", rows, load=load)


if __name__ == "__main__":
    main()

"""Pictures and instructions that the embedded editors understand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..io import pictures
from ..micro import scenes

# Tasks of micro.scenes: seed and kind.
TASKS = ((1, "add"), (13, "recolor"), (23, "remove"), (42, "background"))
SIZE = 384  # px a side


@dataclass(frozen=True)
class Example:
    """A picture's file and what to ask for."""

    file: Path
    prompt: str


def write(folder: Path, size: int = SIZE) -> list[Example]:
    """Draw the examples' pictures into a folder."""
    made = []
    for seed, kind in TASKS:
        case = scenes.sample(seed, size, kind)
        file = folder / f"{case.kind}-{seed}.png"
        pictures.write(case.source, file)
        made.append(Example(file, case.prompt))
    return made

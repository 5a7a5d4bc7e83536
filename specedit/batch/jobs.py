"""One row, checked: what to edit, how, and where the picture goes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .. import pipelines
from ..micro import words
from . import settings
from .sources import Record

IMAGE = ("image", "picture")  # names of the column with the picture
OWN = (*IMAGE, "prompt", "id", "mask", "out", "settings")
COLUMNS = (*OWN, *settings.NAMES)
PICTURE = ".png"


@dataclass(frozen=True)
class Job:
    """A row that can run.

    Args:
        index, id, row: its place in the input, its name, and the hash of its content.
        image, mask: paths; also bytes of a file or arrays where they come from memory.
        prompt: as the pipeline gets it.
        out: file to write, relative to the output folder.
        asked: settings by name, the command's included.
        layout: about the width and height at which it is edited; None if that was not looked up.
        notes: sentences for the user.
    """

    index: int
    id: str
    row: str
    image: Any
    prompt: str
    mask: Any
    out: str
    asked: dict[str, Any] = field(default_factory=dict)
    layout: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> settings.Settings:
        return settings.check(self.asked)


@dataclass(frozen=True)
class Rules:
    """What all rows of a run share.

    model: as for `specedit edit`. prompt, defaults: of rows without their own. folder: where relative paths start.
    """

    model: str | None = None
    prompt: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @cached_property
    def embedded(self) -> bool:
        """Whether the model is an embedded editor, or one trained like it."""
        known = (None, *pipelines.EDITORS)
        return self.model in known or pipelines.loading.embedded_editor(str(self.model)) is not None

    def row_hash(self, record: Record) -> str:
        """16 hexadecimal digits of the row's content, with the settings and the model that it runs with."""
        content = {name: value for name, value in record.values.items() if name in COLUMNS}
        content = {"prompt": self.prompt, "model": self.model, "defaults": dict(self.defaults), **content}
        return _hash(json.dumps(content, sort_keys=True, default=_described).encode())

    def identity(self, record: Record) -> str:
        """The row's id: its column, else its index and the start of its hash."""
        given = record.values.get("id")
        return f"{record.index:06}-{self.row_hash(record)[:8]}" if given is None else str(given)

    def job(self, record: Record) -> Job:
        """The checked job of a row.

        Raises:
            TypeError, ValueError: naming the column, what was expected and what came.
        """
        if record.problem is not None:
            raise ValueError(record.problem)
        values = record.values
        prompt, notes = self._prompt(values)
        asked = settings.merged(self.defaults, values)
        checked = settings.check(asked)
        image = self._file("image", next((values[name] for name in IMAGE if name in values), None))
        mask = None if values.get("mask") is None else self._file("mask", values["mask"])
        identity = self.identity(record)
        return Job(
            record.index, identity, self.row_hash(record), image, prompt, mask, _target(identity, values.get("out")),
            asked, self._layout(image, checked.size), notes,
        )  # fmt: skip

    def _prompt(self, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        prompt = values.get("prompt", self.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected what to change, got {'none' if prompt is None else repr(prompt)}")
        return words.understood(prompt) if self.embedded else (prompt, ())

    def _file(self, name: str, value: Any) -> Any:
        """The absolute path of a picture; what lies in memory as it is, also in the form of Hugging Face's tables."""
        if isinstance(value, dict) and {"bytes", "path"} >= value.keys():
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) or hasattr(value, "__array__"):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}: expected the path of a picture, got {'none' if value is None else repr(value)}")
        path = (self.folder / Path(value).expanduser()).absolute()
        if not path.is_file():
            found = "which is a folder" if path.is_dir() else "which does not exist"
            raise ValueError(f"{name}: expected a picture file, got {value}, {found}")
        return str(path)

    def _layout(self, image: Any, size: int | None) -> tuple[int, int] | None:
        """About the size of the edit; PictureError where the picture's header cannot be read."""
        from ..io import pictures

        if isinstance(image, str):
            width, height = pictures.size(image)
        elif isinstance(image, bytes):
            width, height = pictures.size(io.BytesIO(image), "image")
        else:  # an array, which the worker checks
            return None
        return pipelines.planned_size(width, height, embedded=self.embedded, largest=size)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _described(value: Any) -> str:
    """What stands for a value that JSON has no form of: the hash of its bytes, or its text."""
    if isinstance(value, bytes):
        return _hash(value)
    return _hash(value.tobytes()) if hasattr(value, "tobytes") else repr(value)


def _target(identity: str, out: Any) -> str:
    """The file that a row writes, in the output folder."""
    name = f"{identity}{PICTURE}" if out is None else out
    what = "id" if out is None else "out"
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{what}: expected a file name, or a path below the output folder, got {name!r}")
    return str(path)

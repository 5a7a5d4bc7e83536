"""Read the rows of a batch: a folder of pictures, a JSONL file or a Parquet file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row as it was given.

    values: its columns, without empty ones. problem: why there are none. name: for messages.
    """

    index: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    name: str = ""


def read(source: Path) -> tuple[list[Record], Path]:
    """The rows of `source`, and the folder that their relative paths start from.

    Raises:
        ValueError: no such source, a file of another kind, one that cannot be read, or no rows.
        ImportError: a Parquet file without pyarrow.
    """
    if source.is_dir():
        records, folder = list(_pictures(source)), source
    else:
        records, folder = _rows(source), source.parent
    if not records:
        raise ValueError(f"{source}: expected {'pictures' if source.is_dir() else 'rows'}, got none")
    return records, folder


def _rows(source: Path) -> list[Record]:
    kind = source.suffix.lower()
    if kind not in SUFFIXES or not source.is_file():
        found = "which does not exist" if not source.exists() else f"a file of kind {kind or 'without a suffix'}"
        raise ValueError(f"source: expected a folder, or a file {', '.join(SUFFIXES)}, got {source}, {found}")
    return _parquet(source) if kind == ".parquet" else _lines(source)


def _pictures(folder: Path) -> Iterator[Record]:
    """The pictures in a folder, by name without a suffix where that is unique. Other files and hidden ones are not."""
    from PIL import Image

    known = Image.registered_extensions().keys() | {".heic", ".heif"}
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in known and path.is_file())
    names = [name for name in names if not name.startswith(".")]
    stems = Counter(Path(name).stem for name in names)
    for index, name in enumerate(names):
        stem = Path(name).stem
        yield Record(index, {"image": name, "id": stem if stems[stem] == 1 else name}, name=name)


def _lines(source: Path) -> list[Record]:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise ValueError(f"{source}: expected JSON objects in UTF-8, one a line, got other bytes: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    records = [_line(index, number, line) for index, (number, line) in enumerate(numbered)]
    if records and all(record.problem for record in records):
        raise ValueError(f"{source}: expected JSON objects, one a line; {records[0].name}: {records[0].problem}")
    return records


def _line(index: int, number: int, line: str) -> Record:
    name = f"line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        return Record(index, problem=f"expected a JSON object, got {_short(line)}: {error}", name=name)
    if not isinstance(values, dict):
        return Record(index, problem=f"expected a JSON object, got {_short(line)}", name=name)
    return Record(index, without_empty(values), name=name)


def _parquet(source: Path) -> list[Record]:
    try:
        table = read_table(source)
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise ValueError(f"{source}: expected a Parquet file, got one that cannot be read: {error}") from error
    return [Record(index, without_empty(values), name=f"row {index}") for index, values in enumerate(table.to_pylist())]


def read_table(file: Path) -> Any:
    """The table in a Parquet file alone; pyarrow's `read_table` would add columns from the names of its folders."""
    with parquet_module().ParquetFile(file) as opened:
        return opened.read()


def parquet_module() -> Any:
    """pyarrow.parquet. ImportError says how to get it."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError('specedit batch: expected pyarrow; pip install "specedit[batch]"') from error
    return parquet


def without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold something: neither None nor NaN, which tables have for what is missing."""
    return {name: value for name, value in values.items() if value is not None and value == value}


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What became of every row: a journal while a run lasts, and a Parquet file when it ends."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..io.files import check_folder, replacing
from .sources import parquet_module, read_table

FILE, JOURNAL = "results.parquet", "results.unfinished.jsonl"
MARK = {b"specedit": b"batch"}  # metadata of the Parquet file
DONE, FAILED = "done", "error"
TEMPORARY = ".specedit-*.part*"  # of specedit.io.files.replacing


@dataclass(frozen=True)
class Result:
    """A row of the results.

    Args:
        id: of the row. output: absolute path of its picture; None after an error.
        status: "done" or "error", and then `error` says why.
        seconds: of the whole row, reading and writing included.
        flops_ratio, edit_fraction, nfe: of the report; None if the stock pipeline ran.
        seed: of the noise. row: hash of the row's content. worker: host and process. notes: sentences for the user.
    """

    id: str
    row: str
    status: str = DONE
    output: str | None = None
    error: str | None = None
    seconds: float | None = None
    flops_ratio: float | None = None
    edit_fraction: float | None = None
    nfe: int | None = None
    seed: int | None = None
    worker: str | None = None
    notes: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.row

    @classmethod
    def of(cls, values: dict[str, Any]) -> Result:
        """A result from a table's row, whatever other columns that has."""
        return cls(**{name: values.get(name) for name in NAMES})  # type: ignore[arg-type]


NAMES = tuple(f.name for f in dataclasses.fields(Result))


class Folder:
    """The output folder of a run, with what earlier runs left.

    Raises:
        ValueError: it cannot be written to, or holds a results file that is not a batch's.
        ImportError: no pyarrow.
    """

    def __init__(self, path: Path):
        check_folder("--out", path)
        self.parquet = parquet_module()
        self.path = path.absolute()
        self.ours = (self.path / JOURNAL).exists()
        self.before = {result.key: result for result in (*self._finished(), *self._unfinished())}

    def _finished(self) -> list[Result]:
        file = self.path / FILE
        if not file.exists():
            return []
        try:
            table = read_table(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"--out: expected a results file in {self.path} that can be read: {error}") from error
        metadata = table.schema.metadata or {}
        if not MARK.items() <= metadata.items():
            raise ValueError(f"--out: expected a folder without other results, got {file}, which no batch wrote")
        self.ours = True
        return [Result.of(values) for values in table.to_pylist()]

    def _unfinished(self) -> list[Result]:
        """The journal's results; a last line that was cut off is not one."""
        if not (self.path / JOURNAL).exists():
            return []
        journal = self.path / JOURNAL
        lines = journal.read_bytes().split(b"\n")[:-1]
        try:
            return [Result.of(json.loads(line)) for line in lines]
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"--out: expected a journal that can be read, got {journal}: {error}; remove it"
            ) from error

    def sweep(self) -> None:
        """Remove the temporary files that killed workers left."""
        for file in self.path.rglob(TEMPORARY):
            file.unlink(missing_ok=True)

    def write(self, results: Sequence[Result]) -> None:
        """Write the Parquet file, whole, and remove the journal.

        Without results there is no file, unless pictures are there: it tells the next run that they are of this one.
        """
        journal = self.path / JOURNAL
        if not results and not any(file != journal for file in self.path.iterdir()):
            journal.unlink(missing_ok=True)
            return
        import pyarrow

        types = {name: pyarrow.string() for name in NAMES}
        types |= dict.fromkeys(("seconds", "flops_ratio", "edit_fraction"), pyarrow.float64())
        types |= dict.fromkeys(("nfe", "seed"), pyarrow.int64())
        schema = pyarrow.schema([*types.items()], metadata=MARK)
        table = pyarrow.Table.from_pylist([dataclasses.asdict(result) for result in results], schema)
        with replacing(self.path / FILE) as part:
            self.parquet.write_table(table, part)
        journal.unlink(missing_ok=True)


class Journal:
    """Appends results to the journal, a line each, so that a run that is killed loses none that it has seen."""

    def __init__(self, folder: Folder):
        self.path = folder.path / JOURNAL

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab")
        if (end := self.file.tell()) and not self.path.read_bytes().endswith(b"\n"):
            whole = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, min(whole, end))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, result: Result) -> None:
        self.file.write(json.dumps(dataclasses.asdict(result)).encode() + b"\n")
        self.file.flush()

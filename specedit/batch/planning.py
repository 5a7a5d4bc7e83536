"""Which rows of a batch run: all are checked before any work, and those that are done are left out."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..io import pictures
from .jobs import COLUMNS, IMAGE, Job, Rules
from .results import DONE, FAILED, FILE, JOURNAL, Folder, Result
from .sources import Record
from .worker import line

ALIKE = 0.8  # how similar an unknown column is to a known one that it is taken for a misspelling
LISTED = 5


@dataclass
class Plan:
    """Rows of a run.

    order: the key of every row in the input's order. todo: jobs to run, those of one layout and setting side by side.
    failed: results of rows that cannot run. kept: results of earlier runs. notes: sentences for the user.
    """

    order: list[tuple[str, str]] = field(default_factory=list)
    todo: list[Job] = field(default_factory=list)
    failed: list[Result] = field(default_factory=list)
    kept: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.order)


def plan(source: Path, records: Sequence[Record], rules: Rules, folder: Folder, *, overwrite: bool = False) -> Plan:
    """Check every row, and leave out those that `folder` has the results of.

    overwrite: replace results of other rows, or of the same rows with other settings.

    Raises:
        ValueError: a missing or misspelt column, two rows of one id or one file, a row that would overwrite its input,
            or an output folder that holds other results.
    """
    planned = Plan(notes=_check_columns(source, records, rules))
    jobs = []
    for record in records:
        try:
            job = rules.job(record)
            pictures.check_target(folder.path / job.out)
        except (TypeError, ValueError) as error:
            key = rules.identity(record), rules.row_hash(record)
            planned.failed.append(Result(*key, status=FAILED, error=line(error)))
        else:
            jobs.append(job)
            key = job.id, job.row
        planned.order.append(key)
    names = {key[0]: record.name for key, record in zip(planned.order, records)}
    _check_distinct("id", [key[0] for key in planned.order], [record.name for record in records])
    _check_distinct("out", [job.out for job in jobs], [names[job.id] for job in jobs])
    _check_inputs(jobs, folder)
    if not overwrite:
        _check_folder(jobs, set(planned.order), folder)
    for job in jobs:
        done = folder.before.get((job.id, job.row))
        if done is not None and done.status == DONE and (folder.path / job.out).is_file():
            planned.kept.append(done)
        else:
            planned.todo.append(job)
    planned.todo = _side_by_side(planned.todo)
    return planned


def _side_by_side(jobs: Sequence[Job]) -> list[Job]:
    """Jobs of one layout follow each other, and among them those of one configuration."""
    layouts: dict[object, int] = {}
    configs: dict[object, int] = {}

    def place(job: Job) -> tuple[int, int]:
        config = job.settings.config
        return layouts.setdefault(job.layout, len(layouts)), configs.setdefault(config, len(configs))

    return sorted(jobs, key=place)


def _check_columns(source: Path, records: Sequence[Record], rules: Rules) -> list[str]:
    """Notes on columns that nothing reads."""
    columns = {name: None for record in records for name in record.values}
    listed = ", ".join(columns)
    if not any(name in columns for name in IMAGE):
        raise ValueError(f"{source}: expected a column image, got {listed}")
    if all(name in columns for name in IMAGE):
        raise ValueError(f"{source}: expected one column with pictures, got both {' and '.join(IMAGE)}")
    other = [name for name in columns if name not in COLUMNS]
    for name in other:
        if close := difflib.get_close_matches(name, COLUMNS, n=1, cutoff=ALIKE):
            raise ValueError(f"{source}: expected known columns, got {name!r}; did you mean {close[0]!r}?")
    if "prompt" not in columns and rules.prompt is None:
        raise ValueError(f"{source}: expected a column prompt, or --prompt for all rows, got {listed}")
    return [f"columns that nothing reads: {', '.join(other)}"] if other else []


def _check_distinct(what: str, values: Sequence[str], names: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for value, name in zip(values, names):
        if value in first:
            expected = "another for each row" if what == "id" else "another file for each row"
            raise ValueError(f"{what}: expected {expected}, got {value} for {first[value]} and {name}")
        first[value] = name


def _check_inputs(jobs: Iterable[Job], folder: Folder) -> None:
    """No row may write the results file, or over a picture that some row reads."""
    jobs = list(jobs)
    read = {os.path.realpath(path) for job in jobs for path in (job.image, job.mask) if isinstance(path, str)}
    for job in jobs:
        if job.out in (FILE, JOURNAL):
            raise ValueError(f"out: expected another name than the results file's, got {job.out}")
        if os.path.realpath(folder.path / job.out) in read:
            raise ValueError(f"--out: expected another folder than the pictures', got {folder.path / job.out} for both")


def _check_folder(jobs: Iterable[Job], keys: set[tuple[str, str]], folder: Folder) -> None:
    """The folder may hold what an earlier run of these rows left, and nothing that this run would overwrite."""
    hint = "choose another folder, or --overwrite"
    other = [result.id for result in folder.before.values() if result.status == DONE and result.key not in keys]
    if other:
        ids = {identity for identity, _ in keys}
        what = "these rows with other settings" if other[0] in ids else "other rows"
        listed = ", ".join(other[:LISTED]) + ("" if len(other) <= LISTED else f" and {len(other) - LISTED} more")
        raise ValueError(
            f"--out: expected results of these rows in {folder.path}, got those of {what}: {listed}; {hint}"
        )
    if folder.ours:
        return
    for job in jobs:
        if (file := folder.path / job.out).exists():
            raise ValueError(f"--out: expected a folder without other results, got {file}; {hint}")

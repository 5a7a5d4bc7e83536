"""Rows of a batch through Ray Data: actors that each hold one installed pipeline.

    rows = ray.data.read_parquet("rows.parquet")
    rows.map_batches(Editor, fn_constructor_kwargs={"model": "FOLDER", "out": "edited"}, num_gpus=1, concurrency=8)

`Editor` needs no Ray itself, so it also runs, and is tested, without.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..batch import settings
from ..batch.jobs import COLUMNS, Job, Rules
from ..batch.results import FAILED, NAMES, Result
from ..batch.running import Edits
from ..batch.sources import Record, without_empty
from ..batch.worker import BrokenDevice, Worker, line

LOCAL = "local"  # the address that starts Ray on this machine
ROWS = 8  # rows of one layout that an actor takes at a time
TRIES = 3  # of a row whose actor dies while it runs
ATTEMPTS = ".specedit-{}.part"  # a temporary file by its name, so that a run's end removes it
PICTURE = "edited"  # column with the edited pictures where none are written


class Editor:
    """Edits batches of rows; the callable class for `Dataset.map_batches`.

    Args:
        model, offload: as for `specedit edit`: a hub id, a folder, or an embedded editor, by default "kontext".
        out: folder for the pictures, which every machine must reach; None returns them instead.
        prompt: of rows without their own.
        folder: where relative paths start, by default the actor's working directory.
        threads: of PyTorch, by default its own choice.
        asked: settings of rows without their own: `preset`, `steps`, `size`, `seed`, `negative_prompt`,
            `true_cfg_scale`, or any field of SpecEditConfig.

    A batch is a mapping of columns: `image` (path, bytes of a file, or array (H, W, 3) of bytes), `prompt`, and
    optionally `mask`, `id`, `out`, `settings` (JSON) and any setting by name. Other columns are passed through. The
    columns of `specedit.batch.results.Result` are added, and without `out` also "edited": PNG files as bytes,
    None after an error. A row that fails has status "error"; it does not stop the others.

    Raises:
        TypeError, ValueError: a setting or a model that is not what was expected.
    """

    def __init__(
        self, model: str | None = None, *, out: str | os.PathLike[str] | None = None, prompt: str | None = None,
        folder: str | os.PathLike[str] = "", threads: int | None = None, offload: bool = False, **asked: Any,
    ):  # fmt: skip
        settings.check(asked)
        self.rules = Rules(model, prompt, asked, Path(folder))
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.worker = Worker(model, None if out is None else Path(out).absolute(), offload=offload)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the columns of the results."""
        columns = {name: list(values) for name, values in batch.items()}
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        made = [self._edit(index, row) for index, row in enumerate(rows)]
        found: dict[str, Any] = {name: _column(values) for name, values in columns.items() if name not in NAMES}
        for name in NAMES:
            found[name] = _column([getattr(result, name) for result, _ in made])
        if self.worker.out is None:
            found[PICTURE] = _column([None if picture is None else _png(picture) for _, picture in made])
        return found

    def _edit(self, index: int, row: Mapping[str, Any]) -> tuple[Result, Any]:
        record = Record(index, _values(row))
        try:
            job = self.rules.job(record)
        except (TypeError, ValueError) as error:
            return Result(self.rules.identity(record), self.rules.row_hash(record), FAILED, error=line(error)), None
        with _attempt(job, self.worker.out) as tries:
            if tries > TRIES:
                message = f"expected a picture, got {TRIES} workers that died of this row"
                return Result(job.id, job.row, FAILED, error=message, seed=job.settings.seed), None
            try:
                return self.worker.edit(job)
            except BrokenDevice as error:
                # Ray replaces a process that dies, and not one that raises: there every later row would fail as well.
                print(f"specedit: {line(error)}; this worker ends", file=sys.stderr, flush=True)
                os._exit(1)


@contextmanager
def _attempt(job: Job, out: Path | None) -> Iterator[int]:
    """How often the row has been begun, this time included: a file has a byte for each until the row has ended.

    Ray runs a dead actor's rows again without end. The file tells which of them killed it.
    """
    if out is None:
        yield 1
        return
    out.mkdir(parents=True, exist_ok=True)
    file = out / ATTEMPTS.format(job.row)
    with file.open("ab") as begun:
        begun.write(b".")
    yield file.stat().st_size
    file.unlink(missing_ok=True)


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are read, with numpy's numbers as Python's."""
    given = {name: value for name, value in row.items() if name in COLUMNS}
    arrays = {name: value for name, value in given.items() if getattr(value, "ndim", 0)}
    plain = {
        name: value.item() if hasattr(value, "item") else value for name, value in given.items() if name not in arrays
    }
    lists = {name: value.tolist() for name, value in arrays.items() if name in settings.NAMES}
    return without_empty(plain) | arrays | lists


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _column(values: Sequence[Any]) -> Any:
    """A numpy column of objects, each element as it is."""
    import numpy as np

    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column


@dataclass(frozen=True)
class Cluster:
    """Where rows run.

    address: "local" starts Ray here and stops it at the end; "auto" or host:port is a cluster that runs.
    actors: how many, by default one for each GPU, or without GPUs for each share of `cpus` CPU cores.
    rows: of one layout that an actor takes at a time, and that run again if it dies.
    """

    address: str = LOCAL
    actors: int | None = None
    cpus: int = 1
    rows: int = ROWS

    def edits(self, model: str | None, out: Path, *, offload: bool = False) -> Edits:
        """Edits jobs on the cluster, for `specedit.batch.running.run`.

        Raises (when it runs):
            ImportError: no Ray. ConnectionError: no cluster at the address. ValueError: the actors cannot start.
        """

        def edits(jobs: Sequence[Job]) -> Iterator[Result]:
            with connected(self) as ray:
                gpus = int(ray.cluster_resources().get("GPU", 0))
                cores = int(ray.cluster_resources().get("CPU", 1))
                actors = self.actors or gpus or max(cores // self.cpus, 1)
                given: dict[str, Any] = {"model": model, "out": str(out), "offload": offload}
                share: dict[str, int] = {"num_cpus": self.cpus}
                if gpus:
                    share["num_gpus"] = 1
                else:
                    given["threads"] = self.cpus
                _set_up(ray)
                blocks = [_table(part) for part in parts(jobs, self.rows, actors)]
                done = ray.data.from_arrow(blocks).map_batches(
                    Editor, fn_constructor_kwargs=given, compute=ray.data.ActorPoolStrategy(size=actors),
                    batch_size=None, **share,
                )  # fmt: skip
                try:
                    for table in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                        yield from (Result.of(values) for values in table.select(NAMES).to_pylist())
                except ray.exceptions.RayError as error:
                    raise ValueError(f"--ray: expected actors that load the pipeline, got {_reason(error)}") from error

        return edits


def parts(jobs: Sequence[Job], rows: int, actors: int) -> Iterator[list[Job]]:
    """Neighbouring jobs of one layout, at most `rows` at a time, and fewer where actors would have nothing to do."""
    rows = max(1, min(rows, len(jobs) // (2 * actors)))
    for _, group in groupby(jobs, key=lambda job: job.layout):
        alike = list(group)
        yield from (alike[start : start + rows] for start in range(0, len(alike), rows))


def import_ray() -> Any:
    """Ray with Ray Data. ImportError says how to get it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: nothing is reported
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # errors are raised as well
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f'--ray: expected Ray Data; pip install "specedit[ray]" ({line(error)})') from error
    return ray


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, started here or connected to the cluster, and left at the end. A connection that was there stays."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address == LOCAL:
        need = (cluster.actors or 1) * cluster.cpus
        cores = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, need)
        ray.init(address=LOCAL, include_dashboard=False, num_cpus=cores, _node_ip_address="127.0.0.1", **quiet)
    else:
        ray.init(address=cluster.address, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """The last line of an error of Ray, whose text is the traceback of another process."""
    return line(ValueError(next((text for text in reversed(str(error).splitlines()) if text.strip()), repr(error))))


def _set_up(ray: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False


def _table(jobs: Sequence[Job]) -> Any:
    """A block of rows for `Editor`; pictures in memory go along as bytes."""
    import pyarrow

    names = ("id", "image", "prompt", "mask", "out")
    rows = [{name: getattr(job, name) for name in names} | {"settings": json.dumps(job.asked)} for job in jobs]
    types = dict.fromkeys((*names, "settings"), pyarrow.string())
    for name in ("image", "mask"):
        if any(isinstance(row[name], bytes) for row in rows):
            types[name] = pyarrow.binary()
    return pyarrow.Table.from_pylist(rows, pyarrow.schema([*types.items()]))


__all__ = ["Cluster", "Editor"]

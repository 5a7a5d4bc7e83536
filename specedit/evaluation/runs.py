"""Run a pipeline on a public benchmark's tasks: write pictures for its scorer, and measure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..api.installing import is_active, last_report
from ..config import STOCK_STEPS
from ..io import pictures
from .metrics import mean, psnr
from .tasks import Task

ROWS = "rows.jsonl"
COLUMNS = (  # of the table: key in the rows, heading, factor, format
    ("edit_fraction", "edited", 1, "{:.0%}"),
    ("flops", "TFLOPs", 1e-12, "{:.3f}"),
    ("flops_ratio", "FLOPs ratio", 1, "{:.2f}x"),
    ("flops_ratio_50", "to 50 steps", 1, "{:.2f}x"),
    ("seconds", "seconds", 1, "{:.2f}"),
    ("psnr_against", "against dB", 1, "{:.1f}"),
)
MEASURED = ("flops", "flops_ratio", "flops_ratio_50", "edit_fraction")  # of the report
Settings = dict[str, Any]


def run(
    pipe: Any,
    prepare: Callable[[Image.Image], tuple[Image.Image, dict[str, Any]]],
    tasks: Iterable[Task],
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    against: Path | None = None,
    **call: Any,
) -> list[dict[str, Any]]:
    """Edit every task that `out` does not hold yet, and return one row per task, in order.

    A row is appended to `out`/rows.jsonl, which `begin` opened, once its pictures are written.

    Args:
        pipe: stock, which runs 50 steps, or with SpecEdit installed, which runs its preset's number.
        prepare: from a task's picture to the pipeline's picture and further arguments.
        steps: model evaluations, overriding both.
        seed: of every task's noise.
        against: `out` of an earlier run whose pictures these are compared with.
        call: further arguments of the pipeline's call.

    Returns:
        key, kind, language (if there are several), seconds and accelerated (False if the stock pipeline ran). If
        SpecEdit ran: flops, flops_ratio, flops_ratio_50 and edit_fraction of its report. With `against`:
        psnr_against, in dB over the whole picture, 60 at most.

    Raises:
        ValueError: a picture cannot be read or edited, or differs in size from the one to compare with.
    """
    if steps is None and not is_active(pipe):
        steps = STOCK_STEPS
    if steps is not None:
        call["num_inference_steps"] = steps
    done, rows = _rows(out), []
    for task in tasks:
        row = done.get((task.kind, task.key, task.language))
        if row is None or not all((out / path).is_file() for path in (task.output, task.source_output) if path):
            row = _edit(pipe, prepare, task, out, seed, call)
            with (out / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if against is not None:
            row = row | {"psnr_against": _compared(out / task.output, against / task.output)}
        rows.append(row)
    return rows


def _edit(pipe: Any, prepare: Callable, task: Task, out: Path, seed: int, call: dict[str, Any]) -> dict[str, Any]:
    image = task.image()
    try:
        image, arguments = prepare(image)
    except ValueError as error:
        raise ValueError(f"task {task.output}: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    result = pipe(image=image, prompt=task.prompt, generator=generator, **arguments | call).images[0]
    row = {"key": task.key, "kind": task.kind} | ({} if task.language is None else {"language": task.language})
    row["seconds"] = time.perf_counter() - began
    report = last_report(pipe)
    row["accelerated"] = report is not None
    if report is not None:
        measured = {name: getattr(report, name, None) for name in MEASURED}
        row |= {name: value for name, value in measured.items() if value is not None and math.isfinite(value)}
    if task.source_output is not None:
        pictures.write(task.source(), out / task.source_output)
    pictures.write(result, out / task.output)
    return row


def _compared(path: Path, other: Path) -> float:
    first, second = (np.asarray(pictures.read(file).image) for file in (path, other))
    if first.shape != second.shape:
        sizes = [f"{width} x {height}" for height, width, _ in (second.shape, first.shape)]
        raise ValueError(f"--against: expected {path} of the size of {other}, {sizes[0]}, got {sizes[1]}")
    return psnr(first, second, np.ones(first.shape[:2], dtype=bool))


def begin(out: Path, settings: Settings) -> None:
    """Create `out`, or check that the run in it has the same settings, so that it can be resumed.

    Raises:
        ValueError: `out` holds a run with other settings.
    """
    path = out / ROWS
    whole, *cut_off = path.read_text(encoding="utf-8").rpartition("\n") if path.is_file() else [""]
    if "\n" not in whole:  # no row yet
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return
    held = read_settings(out)
    if other := [name for name in {**held, **settings} if held.get(name) != settings.get(name)]:
        was, now = (", ".join(f"{name} {s.get(name)}" for name in other) for s in (held, settings))
        raise ValueError(f"--out: expected another folder, because {out} holds a run with {was}; this one has {now}")
    if cut_off[-1]:  # interrupted while writing a row
        path.write_text(whole + "\n", encoding="utf-8")


def read_settings(out: Path) -> Settings:
    """The settings of the run in `out`; ValueError without one."""
    try:
        with (out / ROWS).open(encoding="utf-8") as file:
            return json.loads(file.readline())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the folder of an earlier run, got {out}, which holds no {ROWS} of one") from error


def check_against(tasks: Iterable[Task], against: Path) -> Settings:
    """The settings of the run in `against`; ValueError unless it has every task's picture."""
    settings = read_settings(against)
    if missing := [task.output for task in tasks if not (against / task.output).is_file()]:
        raise ValueError(
            f"--against: expected every task in {against}, got none of {len(missing)}, such as {missing[0]}"
        )
    return settings


def _rows(out: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    """The rows of `out` by kind, key and language; the last one wins."""
    lines = (out / ROWS).read_text(encoding="utf-8").splitlines()[1:]
    return {(row["kind"], row["key"], row.get("language")): row for row in map(json.loads, lines)}


def means(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over all rows and over each kind; `count` is the number of rows."""
    numbers = [name for name, *_ in COLUMNS]

    def of(some: list[dict[str, Any]]) -> dict[str, float]:
        return mean([{name: row[name] for name in numbers if name in row} for row in some])

    kinds = sorted({row["kind"] for row in rows})
    return of(rows), {kind: of([row for row in rows if row["kind"] == kind]) for kind in kinds}


def table(whole: dict[str, float], kinds: dict[str, dict[str, float]]) -> str:
    """Means as a text table; columns without values are left out."""
    columns = [column for column in COLUMNS if column[0] in whole]
    lines = [["", "tasks", *(heading for _, heading, *_ in columns)]]
    for kind, means in [*kinds.items(), ("all", whole)]:
        cells = (form.format(means[name] * scale) if name in means else "-" for name, _, scale, form in columns)
        lines.append([kind, f"{means['count']:.0f}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )

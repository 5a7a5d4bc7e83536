"""Clock against FLOPs at real size: stock pipelines against SpecEdit on random weights (benchmarks/real_models.py).

    python -m benchmarks.end_to_end --json FILE [--minutes 8] [--model M]... [--size 1024x1024]... [--tiny]

An edit mask of a given share replaces the detected one; draft and verification still run and are timed. Every
measurement is written to FILE at once, and not repeated if FILE holds it: run the same command again to resume.
--minutes stops before a measurement that would not fit. --part transformer times single transformer steps against the
number of tokens. --tiny uses small widths, on any machine.

--changes "reference_refresh=4 guidance_range=(0.2,0.9)" overrides further fields of the presets.

Stock's 50 steps (--stock-steps: 4 of a distilled model) run in full, with the fastest attention backend, eager and
under compile_repeated_blocks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks import real_models
from benchmarks.editor_bench import Bench, Case, fields, first_line
from benchmarks.transformer_steps import transformer_steps
from specedit.config import CHOICES, STANDARD_PRESETS, STANDARD_RESTORES, STOCK_STEPS, presets, resolve
from specedit.evaluation import results

SHAPES = ("blob", "scattered")
EXECUTIONS = ("eager", "compiled")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything asked for, the stock pipelines of a setting before what is compared with them."""
    for batch in args.batch:
        for height, width in args.size:
            for model in args.model:
                for execution in args.execution:
                    yield Case(model, height, width, batch, execution)
                    for share in args.share:
                        for shape in args.shape if share < 1 else args.shape[:1]:  # all of it has but one shape
                            for preset in args.preset:
                                for restore in args.restore:
                                    for changes in args.changes:
                                        yield Case(
                                            model, height, width, batch, execution, preset, restore, share, shape,
                                            changes,
                                        )  # fmt: skip


def rows(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every SpecEdit measurement against every stock one of its setting, as rows of an `end_to_end` result file."""
    measured = [(Case(**m["case"]), m) for m in measurements]
    found_rows = []
    for case, m in measured:
        for other, stock in measured:
            steps = stock.get("steps", STOCK_STEPS)
            if case.preset is None or other.preset is not None or other.setting != case.setting:
                continue
            seconds, seconds_stock = statistics.median(m["seconds"]), statistics.median(stock["seconds"])
            speedup, flops_ratio = seconds_stock / seconds, m["flops_ratio"] * steps / STOCK_STEPS
            found_rows.append(
                dict(
                    model=case.model, preset=case.preset, restore=case.restore, edit_fraction=m["edit_fraction"],
                    height=case.height, width=case.width, batch=case.batch, shape=case.shape, changes=case.changes,
                    execution=case.execution, attention=m["attention"],
                    baseline=f"stock {steps} steps, {other.execution}, {stock['attention']} attention",
                    seconds_stock=seconds_stock, seconds=seconds, speedup=speedup,
                    flops_ratio=flops_ratio, stock_steps=steps,
                    quotient=speedup / flops_ratio,
                    spread_stock=max(stock["seconds"]) - min(stock["seconds"]),
                    spread=max(m["seconds"]) - min(m["seconds"]),
                    repeats_stock=len(stock["seconds"]), repeats=len(m["seconds"]), first_seconds=m["first_seconds"],
                    peak_memory_stock=stock["peak_memory"], peak_memory=m["peak_memory"], stages=m["stages"],
                )
            )  # fmt: skip
    return found_rows


class Record:
    """The result file: previous measurements and new ones, written at once."""

    LISTS = ("measurements", "transformer", "failures", "backends")

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command
        held = json.loads(path.read_text()) if path.exists() else {}
        self.lists: dict[str, list] = {name: held.get(name, []) for name in self.LISTS}
        if held:
            now = results.machine()
            for name in ("gpu", "cpu", "torch", "triton", "diffusers", "commit"):
                if held["machine"].get(name) != now[name]:
                    raise ValueError(
                        f"{path} was measured with {name} {held['machine'].get(name)}, this is {now[name]}: "
                        "expected one machine and one state of the code in a file; give another --json"
                    )

    def has(self, case: dict[str, Any], retry: bool = False) -> bool:
        names = self.LISTS[:2] if retry else (*self.LISTS[:2], "failures")
        return any(entry["case"] == case for name in names for entry in self.lists[name])

    def add(self, name: str, entry: dict) -> None:
        self.lists[name].append(entry)
        results.write(self.path, self.command, rows(self.lists["measurements"]), **self.lists)


class Budget:
    """Whether the next measurement fits, judged by the slowest of its kind so far, or of any kind."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.perf_counter() + 60 * minutes
        self.taken: dict[Any, float] = {}

    def fits(self, kind: Any) -> bool:
        expected = self.taken.get(kind, max(self.taken.values(), default=0.0))
        return self.end is None or time.perf_counter() + expected < self.end

    def run(self, kind: Any, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.taken[kind] = max(self.taken.get(kind, 0.0), time.perf_counter() - began)


def edits(bench: Bench, record: Record, budget: Budget) -> int:
    """Measure every case that is not in the file; return how many are left."""
    args = bench.args
    wanted = [case for case in cases(args) if not record.has(asdict(case), args.retry)]
    skipped: set[str] = set()
    for i, case in enumerate(wanted):
        kind = (*case.setting, case.execution, case.preset)
        if not budget.fits(kind):
            return len(wanted) - i
        small = real_models.conditioned_small(case.height * case.width) if args.tiny else nullcontext()
        try:
            bench.load(case.model)
            if case.preset is not None and bench.adapter() is None:
                if case.model not in skipped:
                    print(f"{case.model}: skipped, specedit.install does not support {type(bench.pipe).__name__}")
                skipped.add(case.model)
                continue
            with small:
                done = budget.run(kind, partial(bench.measure, case))
        except Exception as error:  # go on with the others; the exit code reports failures
            record.add("failures", dict(case=asdict(case), error=f"{type(error).__name__}: {first_line(error)}"))
            print(f"{case}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            continue
        record.add("measurements", done)
        print(f"{case}: {statistics.median(done['seconds']):.3f} s", flush=True)
    return 0


def size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, as in 1440x720, got {text!r}") from None
    if min(height, width) < 64 or height % 16 or width % 16:
        raise argparse.ArgumentTypeError(f"expected sides of at least 64 px, multiples of 16, got {text!r}")
    return height, width


def share(text: str) -> float:
    try:
        value = float(text) / 100
    except ValueError:
        value = -1
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a percentage above 0 and up to 100, got {text!r}")
    return value


def changes(text: str) -> str:
    try:
        resolve(**fields(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    timed = list(STANDARD_PRESETS)[::-1]

    def several(name: str, default: list, **more: Any) -> None:
        parser.add_argument(f"--{name}", action="append", help=f"default: {default}; may be repeated", **more)
        defaults[name] = default

    defaults: dict[str, list] = {}
    parser.add_argument("--json", type=Path, required=True, help="result file; an unfinished one is resumed")
    parser.add_argument("--part", choices=["edits", "transformer"], default="edits")
    parser.add_argument("--minutes", type=float, help="stop before the measurement that would not fit")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of each; the median counts")
    parser.add_argument("--stock-steps", type=int, default=STOCK_STEPS, help="of the stock pipeline that is compared")
    parser.add_argument("--enough", type=float, default=120, help="seconds of timed calls after which repetition stops")
    parser.add_argument("--retry", action="store_true", help="retry failed cases")
    parser.add_argument("--tiny", action="store_true", help="small widths and pictures, to test the harness")
    several("model", ["flux-kontext", "qwen-image-edit"], choices=list(real_models.MODELS))
    several("size", [(1024, 1024), (768, 768), (1440, 720)], type=size)
    several("batch", [1, 4], type=int)
    several("execution", list(EXECUTIONS), choices=EXECUTIONS)
    several("preset", timed, choices=list(presets))
    several("restore", list(STANDARD_RESTORES), choices=CHOICES["restore"])
    several("share", [0.1, 0.2, 0.05, 0.4, 1.0], type=share)
    several("shape", list(SHAPES), choices=SHAPES)
    several("changes", [""], type=changes)
    args = parser.parse_args(arguments)
    if args.tiny:
        defaults |= dict(size=[(128, 128), (96, 192)], batch=[1, 2])
    for name, default in defaults.items():
        setattr(args, name, getattr(args, name) or default)
    if min(args.repeat, args.stock_steps, *args.batch) < 1:
        parser.error("--repeat, --batch, --stock-steps: expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        record = Record(args.json, shlex.join(["python", "-m", "benchmarks.end_to_end", *given]))
    except ValueError as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 2
    diffusers.utils.logging.set_verbosity_error()  # every change of attention backend warns
    bench, budget = Bench(args, record.lists["backends"]), Budget(args.minutes)
    before = len(record.lists["failures"])
    work = edits if args.part == "edits" else transformer_steps
    with torch.no_grad():
        left = work(bench, record, budget)
    print(f"{left} left; run the same command again to go on" if left else "everything is measured")
    return 1 if len(record.lists["failures"]) > before else 0


if __name__ == "__main__":
    sys.exit(main())

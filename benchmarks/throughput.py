"""Pictures a minute of `specedit batch`: one process with all cores against Ray actors with one core each.

    python -m benchmarks.throughput --out benchmarks/results/throughput-cpu.json

Every case is a run of the command, in a process of its own, over the same tasks of the embedded editor.
`pictures_per_minute` is the rate of workers that are loaded, from the seconds of every row after each worker's first.
`seconds` is the whole command, and `other_seconds` what of it no worker spent on rows: imports, loading, Ray's start
and end. `load` is the machine's before each run: other work slows a process with several threads most. --small runs few
tiny pictures without Ray, as a check of the command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as parquet

from specedit.evaluation import results
from specedit.io import pictures
from specedit.micro import scenes
from specedit.micro.loading import identity
from specedit.pipelines import EDITORS

ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=EDITORS, default=EDITORS[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--preset", default="turbo")
    parser.add_argument("--cores", type=int, default=2, help="threads of the one process, and actors")
    parser.add_argument("--small", action="store_true", help="4 rows of 64 px with one core, without Ray")
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    args = parser.parse_args(arguments)
    command = f"python -m benchmarks.throughput --model {args.model} --rows {args.rows} --size {args.size} --preset "
    command += f"{args.preset} --cores {args.cores}" + " --small" * args.small
    if args.small:
        args.rows, args.size, args.cores = 4, 64, 1
    rows = []
    print(f"{'case':32}{'pictures a minute':>18}{'a row':>9}{'in all':>9}{'other':>9}")
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder), args.rows, args.size)
        for number, (case, options, threads) in enumerate(cases(args.cores, args.small)):
            row = {"case": case, **measure(args, source, Path(folder) / f"out{number}", options, threads)}
            rows.append(row)
            times = "".join(f"{row[name]:9.2f}" for name in ("seconds_a_row", "seconds", "other_seconds"))
            print(f"{case:32}{row['pictures_per_minute']:18.1f}{times}")
    if args.out is not None:
        results.write(args.out, command, rows, of=identity(args.model))
        print(f"wrote {args.out}")


def cases(cores: int, small: bool) -> Iterator[tuple[str, list[str], int]]:
    """Name, options and threads of every case."""
    yield f"one process, {cores} threads", [], cores
    if not small:
        yield f"Ray, {cores} actors of 1 thread", ["--ray", "--actors", str(cores), "--cpus", "1"], 1


def write_rows(folder: Path, count: int, size: int) -> Path:
    """Tasks of the embedded editor as pictures and rows."""
    lines = []
    for seed in range(count):
        case = scenes.sample(seed, size)
        pictures.write(case.source, folder / f"{seed}.png")
        lines.append(json.dumps({"id": str(seed), "image": f"{seed}.png", "prompt": case.prompt}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def measure(args: argparse.Namespace, source: Path, out: Path, options: list[str], threads: int) -> dict:
    """Run the command once; its throughput and its seconds."""
    words = ["batch", str(source), "--out", str(out), "--model", args.model, "--preset", args.preset, *options]
    load = os.getloadavg()[0]
    started = time.perf_counter()
    run_command(words, threads)
    seconds = time.perf_counter() - started
    table = parquet.read_table(out / "results.parquet").to_pylist()
    return {"rows": len(table), "threads": threads, "load": load, "seconds": seconds, **throughput(table, seconds)}


def run_command(words: list[str], threads: int) -> None:
    """Run `specedit` in a process of its own."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-m", "specedit", *words], check=True, stdout=subprocess.DEVNULL, env=env)


def throughput(table: list[dict], seconds: float) -> dict:
    """The rate of the loaded workers, from a results table. seconds: of the whole run."""
    by_worker: dict[str, list[float]] = {}
    for row in table:
        by_worker.setdefault(row["worker"], []).append(row["seconds"])
    # A worker's slowest row is its first, which warms up.
    steady = [fmean(sorted(times)[:-1] or times) for times in by_worker.values()]
    return {
        "workers": len(by_worker), "pictures_per_minute": sum(60 / mean for mean in steady),
        "seconds_a_row": fmean(steady), "other_seconds": seconds - sum(map(sum, by_worker.values())) / len(by_worker),
    }  # fmt: skip


if __name__ == "__main__":
    main()

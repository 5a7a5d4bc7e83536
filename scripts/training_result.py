"""Turn training logs, one per consecutive run, into a file of benchmarks/results.

python scripts/training_result.py runs/kontext/log.json --command "the command that trained"
python scripts/training_result.py runs/kontext/log.json runs/more/log.json --command "one; and the other"
python scripts/training_result.py runs/qwen/log.json --command "the command that trained" --name micro-training-qwen
python scripts/training_result.py runs/new/log.json --keep 2 --command "those; and a third"
"""

import argparse
import json
from pathlib import Path

from specedit.evaluation import results


def combine(logs: list[list[dict]], first: int = 1) -> list[dict]:
    """Rows of all logs in order, each with its run's number, from `first`."""
    return [{"run": number, **row} for number, log in enumerate(logs, first) for row in log]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--command", required=True, help="what trained")
    parser.add_argument("--name", default="micro-training")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    )
    parser.add_argument("--keep", type=int, default=0, help="so many runs of the file stay, before those of the logs")
    args = parser.parse_args(arguments)
    path = args.folder / f"{args.name}.json"
    old = json.loads(path.read_text())["rows"] if args.keep else []
    if (held := max((row["run"] for row in old), default=0)) < args.keep:
        raise SystemExit(f"--keep: expected at most {held}, the runs in {path}, got {args.keep}")
    logs = [json.loads(path.read_text()) for path in args.logs]
    kept = [row for row in old if row["run"] <= args.keep]
    results.write(path, args.command, kept + combine(logs, args.keep + 1))


if __name__ == "__main__":
    main()

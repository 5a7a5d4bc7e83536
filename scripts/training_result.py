"""Turns the logs of a training, one for each run that went on from the last, into a file of benchmarks/results.

python scripts/training_result.py runs/kontext/log.json --command "the command that trained"
python scripts/training_result.py runs/kontext/log.json runs/more/log.json --command "one; and the other"
python scripts/training_result.py runs/qwen/log.json --command "the command that trained" --name micro-training-qwen
"""

import argparse
import json
from pathlib import Path

from specedit import results


def combine(logs: list[list[dict]]) -> list[dict]:
    """Rows of all logs in order, each with the number of its run, from 1."""
    return [{"run": number, **row} for number, log in enumerate(logs, 1) for row in log]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--command", required=True, help="what trained")
    parser.add_argument("--name", default="micro-training")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    )
    args = parser.parse_args(arguments)
    logs = [json.loads(path.read_text()) for path in args.logs]
    results.write(args.folder / f"{args.name}.json", args.command, combine(logs))


if __name__ == "__main__":
    main()

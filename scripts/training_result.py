"""Turns a trainer's log into benchmarks/results/micro-training.json.

python scripts/training_result.py runs/kontext/log.json "the command that trained"
"""

import json
import sys
from pathlib import Path

from specedit import results

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/training_result.py LOG COMMAND")
    target = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "micro-training.json"
    results.write(target, sys.argv[2], json.loads(Path(sys.argv[1]).read_text()))

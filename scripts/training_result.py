"""Turns a trainer's log into benchmarks/results/micro-training.json, or another file there.

python scripts/training_result.py runs/kontext/log.json "the command that trained"
python scripts/training_result.py runs/qwen/log.json "the command that trained" micro-training-qwen
"""

import json
import sys
from pathlib import Path

from specedit import results

if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python scripts/training_result.py LOG COMMAND [NAME]")
    name = sys.argv[3] if len(sys.argv) == 4 else "micro-training"
    target = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / f"{name}.json"
    results.write(target, sys.argv[2], json.loads(Path(sys.argv[1]).read_text()))

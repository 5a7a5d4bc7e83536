"""Measures how long the tests take on this machine, which should have nothing else to do.

    .venv/bin/python scripts/test_times.py [--all] [--out FILE]

Runs `scripts/test.sh` with empty caches of Triton and of torch's compiler, and then the quick tests with what it left
there; with --all, `scripts/test.sh --all` too, also with empty ones. Writes benchmarks/results/test-times.json.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "test-times.json"


def commands() -> list[tuple[str, list[str], str]]:
    """(as the guide writes it, as it is run, whose caches it has) of each command; the last runs first."""
    venv = str(Path(sys.prefix))
    return [
        ('pytest -m "not slow"', [sys.executable, "-m", "pytest", "-q", "-m", "not slow"], "tests"),
        ("scripts/test.sh", ["scripts/test.sh", venv], "tests"),
        ("scripts/test.sh --all", ["scripts/test.sh", "--all", venv], "all"),
    ]


def measure(name: str, command: list[str], caches: Path) -> dict[str, object]:
    """Run a command that ends with pytest's summary in its output; RuntimeError if it fails.

    caches: the folder that compilers keep their results in.
    """
    before, start = _cpu(), time.perf_counter()
    # As on most machines: where it is set every process compiles all files anew.
    environment = {variable: value for variable, value in os.environ.items() if variable != "PYTHONDONTWRITEBYTECODE"}
    environment |= {variable: str(caches / variable) for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        failed = "".join(re.findall(r"^(?:FAILED|ERROR) .*\n", done.stdout, re.MULTILINE))  # then the checks' output
        raise RuntimeError(
            f"{shlex.join(command)}: expected exit code 0, got {done.returncode}\n{failed}{done.stdout[-4000:]}"
        )
    cpu = _cpu() - before
    return {"command": name, "seconds": seconds, "cpu_seconds": cpu, "tests": count(done.stdout)}


def count(output: str) -> int:
    """Tests that passed, by the last summary line of pytest in `output`."""
    found = re.findall(r"\b(\d+) passed\b.* in [\d.]+s", output)
    if not found:
        raise RuntimeError(f"expected pytest's summary, got {output[-200:]!r}")
    return int(found[-1])


def _cpu() -> float:
    """CPU seconds of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--all", action="store_true", help="measure scripts/test.sh --all too")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, command, caches in reversed(commands() if options.all else commands()[:2]):
            row = measure(name, command, Path(scratch, caches))
            rows.insert(0, row)
            print("{command}: {seconds:.0f} s, {cpu_seconds:.0f} CPU seconds, {tests} tests".format(**row), flush=True)
    from specedit.evaluation import results

    results.write(options.out, "scripts/test_times.py", rows, cores=os.cpu_count())
    return 0


if __name__ == "__main__":
    sys.exit(main())

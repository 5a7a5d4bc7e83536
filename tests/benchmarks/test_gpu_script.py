"""benchmarks/gpu.sh: what it refuses, what it remembers, and that its every line runs without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dry_gpu

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
DEFAULT = ["doctor", "tests", "tune", "kernels", "flux", "qwen", "klein", "steps", "caches", "train"]
BY_NAME = ["compile", "micro", "forecast", "methods", "real"]
DRY = ["doctor", "tests", "kernels", "klein"]  # cheap ones; by hand `benchmarks/gpu.sh --dry` runs them all


def run(*arguments, path=None, timeout=900):
    """The script with this Python as python3, or with what lies in a folder `path`."""
    first = str(path or Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{first}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def stand_in(tmp_path):
    """A python3 that notes how it is called, and does what a shell function of the test says."""

    def make(body):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        log = tmp_path / "calls"
        log.unlink(missing_ok=True)
        file = folder / "python3"
        file.write_text(f'#!/usr/bin/env bash\necho "$@" >> {log}\n{body}\n')
        file.chmod(0o755)
        return folder, lambda: log.read_text().splitlines()

    return make


def parts_of(result):
    return re.findall(r"^== (\w+)$", result.stdout, re.MULTILINE)


def test_unknown_words_are_refused(tmp_path):
    for arguments, text in (
        (["--fast"], "expected --out FOLDER, --part NAME, --again or --dry, got --fast"),
        (["--part", "everything"], "expected a part among doctor .* real , got everything"),
    ):
        result = run(*arguments, "--out", tmp_path / "none")
        assert result.returncode == 2 and re.search(text, result.stderr)
        assert not (tmp_path / "none").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs(tmp_path, stand_in):
    folder, calls = stand_in("exit 1")  # torch.cuda.is_available() is False
    result = run("--out", tmp_path, path=folder)
    assert result.returncode == 1 and parts_of(result) == [] and len(calls()) == 1
    assert "torch.cuda.is_available" in calls()[0]


def test_complete_parts_are_left_out_the_next_time(tmp_path, stand_in):
    """A part that failed runs again, and so does one that says that something is left."""
    folder, calls = stand_in(
        'case "$*" in *klein*) exit 1;; *"--part transformer"*) echo "3 left; run the same command again";; esac'
    )
    out = tmp_path / "results"
    wanted = [name for name in DEFAULT if name not in ("tune", "train")]  # which handle files besides
    given = [word for name in wanted for word in ("--part", name)]
    first = run("--out", out, *given, path=folder)
    assert parts_of(first) == wanted and first.returncode == 1
    assert "== goes on the next time: steps" in first.stdout and "== failed: klein" in first.stdout
    done = (out / "gpu-done").read_text().split()
    assert done == [name for name in wanted if name not in ("klein", "steps")]
    (out / "gpu-done").write_text("\n".join([*done, "tune", "train"]) + "\n")
    second = run("--out", out, path=folder)
    assert parts_of(second) == ["klein", "steps"]
    assert parts_of(run("--out", out, "--part", "doctor", path=folder)) == ["doctor"]  # by name, again
    assert [line for line in calls() if "doctor" in line] == 2 * [
        "-m specedit.cli doctor",
        "-m specedit.cli doctor --json",
    ]


def test_a_table_whose_time_is_over_goes_on_the_next_time(tmp_path, stand_in):
    """124 is what `timeout` exits with. A part that also failed is not said to be on its way."""
    folder, calls = stand_in('case "$*" in *specedit.cli*) exit 0;; *benchmarks.*) exit 124;; esac')
    given = [word for name in ("micro", "forecast", "methods") for word in ("--part", name)]
    result = run("--out", tmp_path, *given, path=folder)
    assert result.returncode == 0 and "== goes on the next time: micro forecast methods" in result.stdout
    assert not (tmp_path / "gpu-done").exists() and sum("--resume" in line for line in calls()) == 3
    folder, _ = stand_in('case "$*" in *specedit.cli*) exit 1;; *benchmarks.*) exit 124;; esac')
    result = run("--out", tmp_path, "--part", "micro", path=folder)
    assert result.returncode == 1 and "== failed: micro" in result.stdout and "goes on" not in result.stdout


def test_every_part_is_bounded_by_nine_minutes():
    """The seconds of `timeout`, `measure` and `scored` in each part's function."""
    functions = dict(re.findall(r"^run_(\w+)\(\) \{\n(.*?)^\}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL))
    assert set(functions) == {*DEFAULT, *BY_NAME}
    for name, body in functions.items():
        seconds = [int(n) for n in re.findall(r"\b(?:timeout|measure|scored) (\d+)", body)]
        tools = 2 if name == "tests" else 1  # the sanitizer's line runs for each of two tools
        total = sum(n * (tools if n == 95 else 1) for n in seconds)
        assert seconds and total <= 540, (name, seconds)


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))
def test_parts_run_without_a_gpu(tmp_path, warm_python):
    given = [word for name in DRY for word in ("--part", name)]
    result = run("--dry", "--out", tmp_path, *given, path=warm_python)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert parts_of(result) == DRY
    assert (tmp_path / "gpu-done").read_text().split() == DRY
    found = json.loads((tmp_path / "end_to_end-real-klein.json").read_text())
    assert found["rows"] and not found["failures"]
    assert {row["stock_steps"] for row in found["rows"]} == {4}
    assert {row["edit_fraction"] for row in found["rows"]} == {0.125, 0.1875}
    assert json.loads((tmp_path / "doctor.json").read_text())["problems"] == []

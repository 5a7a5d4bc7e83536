"""What scripts/test_times.py takes from a run."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_times.py"


@pytest.fixture(scope="module")
def times():
    spec = importlib.util.spec_from_file_location("test_times", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_last_summary_counts(times):
    assert times.count("1 passed in 0.12s\n== all\n3800 passed, 12 skipped in 301.20s (0:05:01)\n== demo\n") == 3800
    with pytest.raises(RuntimeError, match="expected pytest's summary, got 'no tests"):
        times.count("no tests ran")


def test_a_run_is_one_row(times, tmp_path):
    row = times.measure("it", [sys.executable, "-c", "print('2 passed in 0.1s')"], tmp_path)
    assert row.keys() == {"command", "seconds", "cpu_seconds", "tests"}
    assert row["command"] == "it" and row["tests"] == 2 and 0 < row["cpu_seconds"] < 10 and row["seconds"] > 0


def test_compilers_start_from_the_named_folder(times, tmp_path):
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    command = (
        f"import os; assert all(os.environ[n].startswith({str(tmp_path)!r}) for n in {names}); print('1 passed in 1s')"
    )
    assert times.measure("it", [sys.executable, "-c", command], tmp_path)["tests"] == 1


def test_the_quick_tests_have_the_caches_of_the_run_before(times):
    names, _, caches = zip(*times.commands(), strict=True)
    assert names == ('pytest -m "not slow"', "scripts/test.sh", "scripts/test.sh --all")  # the last runs first
    assert caches[0] == caches[1] != caches[2]


def test_a_failed_run_is_no_row(times, tmp_path):
    with pytest.raises(RuntimeError, match=r"expected exit code 0, got 3\nFAILED a::b\n.*boom"):
        times.measure(
            "it", [sys.executable, "-c", "print('FAILED a::b\\n' + 5000 * '.' + 'boom'); raise SystemExit(3)"], tmp_path
        )

"""Set-up is measured step by step."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("measure_setup")


def test_a_row_holds_what_its_step_added(setup, tmp_path):
    make = [sys.executable, "-c", "open('new', 'wb').write(bytes(1000))"]
    rows = list(setup.measure(iter([("make", make), ("nothing", [sys.executable, "-c", ""])]), tmp_path))
    assert [(row["step"], row["bytes"]) for row in rows] == [("make", 1000), ("nothing", 0)]
    assert all(row["seconds"] > 0 and row["command"].startswith(sys.executable) for row in rows)


def test_rows_do_not_name_this_machines_paths(setup, tmp_path):
    (row,) = setup.measure(iter([("nothing", [sys.executable, "-c", "pass"])]), tmp_path, {sys.executable: "python3"})
    assert row["command"] == "python3 -c pass"


def test_links_are_not_counted_twice(setup, tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert setup.size_of(tmp_path) == 10


def test_the_readmes_steps_are_measured(setup):
    steps = dict(setup.commands("python3", "repository"))
    assert list(steps) == ["clone", "venv", "install", "demo"]
    readme = (ROOT / "README.md").read_text()
    assert "-m venv .venv && .venv/bin/pip install -q -c constraints.txt . && .venv/bin/specedit demo" in readme
    assert steps["clone"][:2] == ["git", "clone"] and "--depth" in steps["clone"] and "demo" in steps["demo"]

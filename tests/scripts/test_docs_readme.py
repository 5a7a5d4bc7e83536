"""The README's tables, made from result files that hold known figures."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MACHINE = dict(gpu=None, cpu="Some CPU", threads=2, torch="2", diffusers="0", date="today")


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(importlib.import_module("docs_results"), "RESULTS", tmp_path)
    return importlib.import_module("docs_readme")


def write(folder, name, rows, **more):
    (folder / name).write_text(json.dumps({"machine": MACHINE, "command": "the command", "rows": rows} | more))


def scores(flops, seconds, success=0.75):
    return dict(count=4, success=success, keep_psnr=30.0, edit_psnr=20.0, flops=flops, seconds=seconds)


def row(variant, mean, **more):
    cases = [dict(seed=seed, kind="add", seconds=mean["seconds"]) for seed in range(mean["count"])]
    return dict(variant=variant, mean=mean, cases=cases, **more)


def stock(steps, **more):
    return row(f"stock-{steps}", scores(steps * 1e9, steps * 1.0, **more), steps=steps)


def edit(preset, nfe, flops, seconds):
    return row(f"{preset}-full", scores(flops, seconds), preset=preset, restore="full", nfe=nfe)


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gains_compare_with_default_steps_and_with_as_many(readme, tmp_path):
    rows = [stock(28), stock(10, success=0.5), edit("turbo", 9, 3e9, 4.0), edit("balanced", 18, 7e9, 7.0)]
    write(tmp_path, "quality-512.json", rows)
    own, balanced, turbo = cells(readme.gains("quality.json"))
    assert own == ["Kontext, stock, its default steps", "28", "75.0%", "30.0", "1.00", "1.00", "-", "-", "-"]
    # No stock run has about 18 steps, but FLOPs of 18 are known.
    assert balanced == ["Kontext, `balanced`, full", "18", "75.0%", "30.0", "4.00", "4.00", "2.57", "-", "-"]
    assert turbo == ["Kontext, `turbo`, full", "9", "75.0%", "30.0", "9.33", "7.00", "3.00", "50.0% (10 steps)", "2.50"]


def test_gains_without_default_steps_are_left_out(readme, tmp_path):
    write(tmp_path, "quality-qwen-512.json", [stock(10), edit("turbo", 9, 3e9, 4.0)], of={"model": "qwen"})
    (turbo,) = cells(readme.gains("quality.json"))
    assert turbo[:6] == ["Qwen, `turbo`, full", "9", "75.0%", "30.0", "-", "-"] and turbo[6] == "3.00"


def test_gpu_state_names_gpus_once_there_are_results(readme, tmp_path):
    write(tmp_path, "a.json", [])
    assert "Nothing has been measured on a GPU" in readme.gpu_state("")
    write(tmp_path, "b.json", [], machine=MACHINE | {"gpu": "Some GPU"})
    assert readme.gpu_state("").startswith("Measured on Some GPU;")


def test_setup_sums_minutes_and_gigabytes(readme, tmp_path):
    rows = [dict(step="install", seconds=90.0, bytes=2_000_000_000), dict(step="demo", seconds=30.0, bytes=500_000_000)]
    write(tmp_path, "setup.json", rows, load=1.5)
    text = readme.setup("setup.json")
    assert cells(text) == [["install", "1.5", "2.00"], ["demo", "0.5", "0.50"], ["total", "2.0", "2.50"]]
    assert "load 1.5" in text and "the command" in text


def test_test_times_are_shown_by_command(readme, tmp_path):
    write(tmp_path, "test-times.json", [dict(command="pytest", seconds=60, tests=1234)])
    assert cells(readme.test_times("test-times.json")) == [["`pytest`", "1.0", "1,234"]]


def test_missing_files_read_as_not_measured(readme):
    for maker, name in ((readme.gains, "quality"), (readme.setup, "setup"), (readme.test_times, "test-times")):
        assert maker(f"{name}.json") == "*not measured yet*"

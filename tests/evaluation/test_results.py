"""Result files carry their machine; pages carry what the files say."""

import importlib
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from specedit import hardware
from specedit.evaluation import results

ROOT = Path(__file__).parents[2]


def test_result_file_names_its_machine_and_command(tmp_path):
    path = tmp_path / "deep" / "x.json"
    results.write(path, "the command", [dict(a=1.23456789, b=math.nan, c=(1, 2))], mean={"a": 1})
    written = json.loads(path.read_text())
    assert written["rows"] == [{"a": 1.23457, "b": None, "c": [1, 2]}] and written["mean"] == {"a": 1}
    assert {"gpu", "driver", "cpu", "torch", "triton", "diffusers", "commit", "date"} <= set(written["machine"])


def test_other_wait_policy_counts_as_another_machine(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    plain = results.machine()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert results.machine() == plain | {"wait_policy": "PASSIVE"} and "wait_policy" not in plain


def test_a_measurement_says_that_its_code_is_not_that_of_the_commit(monkeypatch, tmp_path):
    module = tmp_path / "specedit" / "evaluation" / "results.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(module))
    assert results.machine()["commit"] is None
    module.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = results.machine()["commit"]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    assert results.machine()["commit"] == commit and "-" not in commit
    (tmp_path / "benchmarks" / "x.py").write_text("2")
    assert results.machine()["commit"] == f"{commit}-dirty"


def test_every_committed_result_names_its_machine_and_command():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        assert content["machine"]["torch"] and content["command"] and content["rows"], file.name


@pytest.mark.slow
def test_pages_say_what_the_results_say(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", ["make_docs.py", "--check"])
    assert importlib.import_module("make_docs").main() == 0, capsys.readouterr().out


def test_the_readme_opens_with_a_line_of_code_and_two_one_line_commands():
    first, *blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    assert first.startswith("python\n") and first.strip().count("\n") == 1
    assert all(block.startswith("sh\n") and block.strip().count("\n") == 1 for block in blocks[:2])
    assert not any(block.startswith("sh\n") for block in blocks[2:])


def test_fingerprint_distinguishes_weights(tmp_path):
    folder = tmp_path / "editor"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "a.safetensors").write_bytes(b"1")
    first = results.fingerprint(folder)
    (folder / "model_index.json").write_text("{}")  # not weights
    assert results.fingerprint(folder) == first
    (folder / "vae" / "a.safetensors").write_bytes(b"2")
    assert results.fingerprint(folder) != first
    assert results.fingerprint(None) is None and results.fingerprint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 1\n\nmodel\t\t: 2\n", "AMD EPYC (family 25, model 1)"),
        ("model name\t: Some CPU\n\n", "Some CPU"),
        ("CPU part\t: 0xd0c\n\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_processors_that_share_a_name_are_told_apart(monkeypatch, tmp_path, text, name):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(hardware, "CPUINFO", file)
    assert results.machine()["cpu"] == name

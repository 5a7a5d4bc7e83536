"""The curve of steps on textures, and the textures of the other tables."""

import json

import pytest

from benchmarks import quality, scores, texture_steps
from specedit import micro
from specedit.micro.evaluation import TEXTURE_SEED


@pytest.mark.thorough
def test_the_curve_of_steps_is_resumed_in_turns(shallow_editors, few_renders, tmp_path, monkeypatch):
    ran, real = [], micro.evaluate
    monkeypatch.setattr(scores, "EVERY", 1)
    monkeypatch.setattr(texture_steps, "STEPS", (1, 2))
    monkeypatch.setattr(
        micro, "evaluate", lambda pipe, cases, steps: ran.append((cases[0].seed, steps)) or real(pipe, cases, steps)
    )
    out, first = tmp_path / "t.json", TEXTURE_SEED + texture_steps.FIRST
    texture_steps.main(["--size", "64", "--cases", "1", "--out", str(out)])
    texture_steps.main(["--size", "64", "--cases", "2", "--out", str(out), "--resume"])
    assert ran == [(first, 1), (first, 2), (first + 1, 1), (first + 1, 2)]
    content = json.loads(out.read_text())
    assert [(row["variant"], row["steps"]) for row in content["rows"]] == [("stock-1", 1), ("stock-2", 2)]
    assert content["command"] == "python -m benchmarks.texture_steps --model kontext --cases 2 --size 64"
    for row in content["rows"]:
        assert row["mean"]["count"] == 2 and row["kinds"]["texture"]["count"] == 2
        assert row["mean"]["texture_distance"] > 0 and "success" not in row["mean"]


@pytest.mark.thorough
def test_tables_have_textures_besides(shallow_editors, few_renders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "variants", lambda: {"stock-1": {"steps": 1}})
    out = tmp_path / "q.json"
    some = ["--size", "96", "--cases", "1", "--out", str(out)]
    quality.main([*some, "--textures", "1"])
    (row,) = json.loads(out.read_text())["rows"]
    assert [case["seed"] for case in row["cases"]] == [0, TEXTURE_SEED] and row["mean"]["count"] == 2
    assert json.loads(out.read_text())["command"].endswith("--cases 1 --textures 1 --size 96")
    said = capsys.readouterr().out
    assert "success" in said and "texture" in said


def test_a_quarter_of_the_tasks_are_textures_besides():
    args = scores.options("x").parse_args(["--cases", "9", "--size", "32", "--out", "x.json"])
    assert [case.kind for case in scores.tasks(args, 5)][9:] == ["texture"] * 2
    assert scores.tasks(args, 5)[9].seed == TEXTURE_SEED + 5
    assert "--textures" not in scores.command("quality", args)


def test_means_in_words_leave_out_what_is_missing():
    said = scores.in_words(dict(texture_distance=1.234, material=1.0, keep_psnr=float("nan"), flops=1e12))
    assert said == "texture 1.23, material 100.0%, 1.000 TFLOPs"

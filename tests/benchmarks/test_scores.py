"""Result files of many tasks: what a resumed run adds, and what it refuses to mix."""

import json
import math

import pytest
from diffusers import FluxKontextPipeline

from benchmarks import forecast, quality, scores
from specedit import micro

TWO = ["--size", "64", "--only", "stock-10", "turbo-reference"]


@pytest.fixture
def scored(monkeypatch):
    """Seeds in the order in which they are scored."""
    seeds, evaluate = [], micro.evaluate

    def counted(pipe, cases, *args):
        seeds.extend(case.seed for case in cases)
        return evaluate(pipe, cases, *args)

    monkeypatch.setattr(micro, "evaluate", counted)
    return seeds


@pytest.mark.slow
def test_a_resumed_run_scores_only_what_is_missing(shallow_editors, tmp_path, scored, monkeypatch):
    monkeypatch.setattr(scores, "EVERY", 1)
    out = tmp_path / "q.json"
    quality.main([*TWO, "--out", str(out), "--cases", "1"])
    first = json.loads(out.read_text())
    assert scored == [0, 0] and [row["variant"] for row in first["rows"]] == ["stock-10", "turbo-reference"]
    stock, turbo = first["rows"]
    assert stock["steps"] == 10 and "nfe" not in stock
    assert (turbo["preset"], turbo["restore"], turbo["nfe"]) == ("turbo", "reference", 9)

    quality.main([*TWO, "--out", str(out), "--cases", "3", "--resume"])
    assert scored == [0, 0, 1, 1, 2, 2]  # the variants take turns
    second = json.loads(out.read_text())
    assert second["of"] == first["of"] and len(second["of"]["weights"]) == 12
    for old, new in zip(first["rows"], second["rows"], strict=True):
        assert new["cases"][0] == old["cases"][0] and [case["seed"] for case in new["cases"]] == [0, 1, 2]
        assert new["mean"]["count"] == 3
        mean = sum(case["edit_psnr"] for case in new["cases"]) / 3
        assert new["mean"]["edit_psnr"] == pytest.approx(mean, rel=1e-4)

    quality.main([*TWO, "--out", str(out), "--cases", "2", "--resume"])  # fewer than it has seen: nothing is lost
    assert len(scored) == 6 and json.loads(out.read_text()) == second


@pytest.mark.slow
def test_missing_numbers_are_left_out_of_the_mean(shallow_editors, tmp_path, scored):
    """Where everything was to change there is nothing to keep: null in the file, nan in the mean of a resumed run."""
    out = tmp_path / "q.json"
    cases = [micro.scenes.sample(0, 128, "remove"), micro.scenes.sample(1, 128, "remove")]
    cases[0].mask[:] = True
    pipe = micro.load("kontext")
    pipe.set_progress_bar_config(disable=True)
    scores.Scores(out, "c", cases[:1], {}, False).score(pipe, "stock", cases[:1], 1)
    assert json.loads(out.read_text())["rows"][0]["cases"][0]["keep_psnr"] is None
    again = scores.Scores(out, "c", cases, {}, True)
    assert [case.seed for case in again.lacks("stock")] == [1]
    again.score(pipe, "stock", cases[1:], 1)
    (row,) = again.rows
    assert math.isfinite(row["mean"]["keep_psnr"]) and row["mean"]["keep_psnr"] == row["cases"][1]["keep_psnr"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["of"].update(weights="0123456789ab"), "0123456789ab"),
        (lambda content: content["of"].update(size=512), "'size': 512"),
        (lambda content: content["machine"].update(threads=1000), "'threads': 1000"),
        (lambda content: content["machine"].update(wait_policy="PASSIVE"), "'wait_policy': 'PASSIVE'"),
        (lambda content: content.pop("of"), "scores of None"),
    ],
)
def test_scores_of_another_editor_are_not_resumed(shallow_editors, tmp_path, scored, change, named):
    out = tmp_path / "q.json"
    quality.main(["--size", "64", "--only", "stock-10", "--cases", "1", "--out", str(out)])
    content = json.loads(out.read_text())
    change(content)
    out.write_text(json.dumps(content))
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=r"--resume: .* expected .*; give another --out") as refused:
        quality.main(["--size", "64", "--only", "stock-10", "--cases", "2", "--out", str(out), "--resume"])
    assert named in str(refused.value) and out.read_bytes() == before and scored == [0]


@pytest.mark.slow
def test_caches_and_the_student_are_scored_and_the_pipeline_is_left_plain(tmp_path, scored, monkeypatch):
    out = tmp_path / "f.json"
    pipes, load = [], micro.load
    monkeypatch.setattr(micro, "load", lambda *args, **kwargs: pipes.append(load(*args, **kwargs)) or pipes[-1])
    names = ["taylor-N9", "student-6-specedit"]
    forecast.main(["--only", *names, "--cases", "1", "--size", "64", "--out", str(out)])
    content = json.loads(out.read_text())
    alone, student = content["rows"]
    assert content["stock_flops"] == pytest.approx(
        student["cases"][0]["flops_ratio"] * student["mean"]["flops"], rel=1e-4
    )
    assert alone["family"] == "cache" and alone["cached_steps"] > 0 and alone["cache_bytes"] > 0
    assert student["family"] == "student + specedit" and student["nfe"] == 6
    assert not [name for name, _ in pipes[0].transformer.named_parameters() if "lora" in name]
    assert type(pipes[0]) is FluxKontextPipeline

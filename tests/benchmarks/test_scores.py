"""Result files of many tasks: what a resumed run adds, and what it refuses to mix."""

import json
import math
from types import SimpleNamespace

import pytest
from diffusers import FluxKontextPipeline

from benchmarks import ablations, few_steps, forecast, methods, quality, scores, sweep, texture_steps
from specedit import micro
from specedit.methods import Fresco

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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["of"].update(weights="0123456789ab"), "0123456789ab"),
        (lambda content: content["of"].update(size=512), "'size': 512"),
        (lambda content: content["machine"].update(torch="1.13.1"), "'torch': '1.13'"),
        (lambda content: content["machine"].update(diffusers="0.1.0"), "'diffusers': '0.1'"),
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


MACHINE = dict(gpu=None, driver=None, cpu="A", threads=1, torch="2.13.0+cpu", triton=None, diffusers="0.42.1")


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Adds tasks of given seconds by seed to a file, as a run on the machine with these changes."""

    def run(seconds, variant="stock", clock=True, **machine):
        monkeypatch.setattr(scores.results, "machine", lambda: MACHINE | dict(commit="c", date="d") | machine)
        file = scores.Scores(tmp_path / "s.json", "the command", [], {"size": 64}, True, clock)
        scored = [dict(seed=seed, kind="add", success=True, seconds=s, flops=1e12) for seed, s in seconds.items()]
        file.add(object(), variant, scored)
        return json.loads(file.path.read_text())

    return run


def test_file_of_one_machine_names_it_once(on):
    on({0: 1.0})
    content = on({1: 3.0}, date="later")
    assert content["machine"]["date"] == "later" and list(content) == ["machine", "command", "of", "rows"]
    assert "machine" not in content["rows"][0]["cases"][0] and content["rows"][0]["mean"]["seconds"] == 2.0


@pytest.mark.parametrize(
    "change", [dict(cpu="B"), dict(threads=2), dict(gpu="G"), dict(wait_policy="PASSIVE"), dict(torch="2.13.1")]
)
def test_another_machine_goes_on_and_each_task_names_its_own(on, change):
    on({0: 1.0})
    on({0: 1.0}, "turbo")
    on({1: 9.0}, **change)
    content = on({2: 3.0}, commit="later")
    stock, turbo = content["rows"]
    assert [case["machine"] for case in stock["cases"]] == [0, 1, 0] and turbo["cases"][0]["machine"] == 0
    assert content["machine"] == content["machines"][0] and content["machines"][0]["commit"] == "later"
    assert content["machines"][1].items() >= change.items() and len(content["machines"]) == 2
    assert turbo["mean"]["seconds"] == 1.0
    for mean in (stock["mean"], stock["kinds"]["add"]):
        assert mean == dict(count=3, success=1.0, flops=1e12, seconds=None)


def test_seconds_of_a_busy_machine_are_left_out(on):
    (row,) = on({0: 5.0, 1: 6.0}, clock=False)["rows"]
    assert [case["seconds"] for case in row["cases"]] == [None, None] and row["mean"]["seconds"] is None
    (row,) = on({2: 2.0})["rows"]
    assert row["mean"]["seconds"] == 2.0 and row["mean"]["count"] == 3
    (row,) = on({3: 7.0}, clock=False, cpu="B")["rows"]
    assert row["mean"]["seconds"] == 2.0 and row["cases"][3]["machine"] == 1  # one machine timed all of them


@pytest.mark.parametrize("module", [ablations, few_steps, forecast, methods, quality, sweep, texture_steps])
def test_every_table_can_be_made_in_parts_and_without_a_clock(module, monkeypatch, tmp_path):
    given = {}

    def stop(self, *args, **more):
        given.update(dict(zip(("path", "command", "cases", "of", "resume", "clock", "part"), args, strict=True)))
        raise KeyboardInterrupt

    monkeypatch.setattr(scores.Scores, "__init__", stop)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--cases", "1", "--size", "64", "--no-clock", "--part", "2/3", "--out", str(tmp_path / "x.json")])
    assert (given["resume"], given["clock"], given["part"]) == (False, False, slice(1, None, 3))
    assert given["command"].startswith(f"python -m {module.__name__} --model kontext --cases 1")
    assert given["of"].items() >= {"model": "kontext", "size": 64}.items()


def test_ablations_run_what_they_are_named_after(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(ablations, "editor", lambda model: None)
    monkeypatch.setattr(ablations, "score", lambda scores, pipe, name, todo, variant: ran.append((name, variant)))
    asked = ["--cases", "1", "--textures", "0", "--size", "64", "--out", str(tmp_path / "x.json")]
    ablations.main([*asked, "--only", "edges", "fresh noise"])
    assert [(name, variant["fields"]["method"]) for name, variant in ran] == [
        ("edges", Fresco(select="edges")), ("fresh noise", Fresco(noise="fresh")),
    ]  # fmt: skip


def test_parts_take_turns_of_the_tasks(tmp_path):
    cases = [micro.scenes.sample(seed, 32) for seed in range(10)]
    parts = [scores.Scores(tmp_path / "p.json", "c", cases, {}, False, part=scores.part(f"{k}/2")) for k in (1, 2)]
    assert [[case.seed for case in part.cases] for part in parts] == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]
    turns = [[case.seed for case in todo] for _, todo in parts[0].turns(["stock"])]
    assert turns == [[0, 1, 2, 3], [8, 9]]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b"])
def test_a_part_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        scores.options("x").parse_args(["--out", "x.json", "--part", text])
    assert f"--part: expected K/N with K from 1 to N, got {text}" in capsys.readouterr().err


def test_a_row_keeps_the_largest_cache_of_its_turns(tmp_path, monkeypatch):
    table = scores.Scores(tmp_path / "q.json", "the command", [], {}, resume=False)
    for seed, held in enumerate((0, 7, 3)):
        report = SimpleNamespace(nfe=9, cached_steps=2, cache_bytes=held)
        monkeypatch.setattr(scores, "last_report", lambda pipe, report=report: report)
        case = dict(seed=seed, kind="add", mask_share=0.1, success=True, edit_psnr=20.0, keep_psnr=30.0, seconds=1.0)
        table.add(None, "turbo", [case])
    (row,) = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert (row["cache_bytes"], row["cached_steps"], row["nfe"], len(row["cases"])) == (7, 2, 9, 3)


@pytest.mark.thorough
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

"""Runs over public benchmarks: pictures where the scorers look, what is measured, and going on after a stop."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from specedit import cli
from specedit.api import installing
from specedit.evaluation import runs as evaluation


def gedit(folder, out, *more):
    given = ["eval", "gedit", "--data", str(folder), "--model", "kontext", "--out", str(out)]
    return cli.main([*given, *more])


def imgedit(folder, out, *more):
    given = ["eval", "imgedit", "--data", str(folder), "--model", "kontext", "--out", str(out)]
    return cli.main([*given, *more])


pytestmark = pytest.mark.usefixtures("shallow_editors")
QUICK = ("--preset", "turbo", "--steps", "3")
STOCK = ("--preset", "stock", "--steps", "1")


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.fixture
def edited(monkeypatch):
    """The tasks that were really run."""
    seen, really = [], evaluation._edit

    def edit(pipe, prepare, task, *more):
        seen.append(task.key)
        return really(pipe, prepare, task, *more)

    monkeypatch.setattr(evaluation, "_edit", edit)
    return seen


@pytest.mark.slow
def test_gedit_writes_the_scorers_files(write_gedit, gedit_rows, tmp_path, picture, monkeypatch, capsys):
    out, path, taken, install = tmp_path / "out", tmp_path / "gedit.json", [], installing.install
    monkeypatch.setattr(installing, "install", lambda *args, **more: taken.append(args[1]) or install(*args, **more))
    assert gedit(write_gedit(gedit_rows), out, *QUICK, "--json", str(path)) == 0
    assert taken == ["turbo"]
    places = [f"fullset/{kind}" for kind in ("color_alter/en/en0", "color_alter/en/en1", "subject-add/en/en2")]
    assert files(out) == sorted([*(f"{p}{end}" for p in places for end in (".png", "_SRCIMG.png")), "rows.jsonl"])
    result, source = (Image.open(out / f"{places[1]}{end}") for end in (".png", "_SRCIMG.png"))
    assert result.size == (96, 64) and np.array_equal(source, picture(64, 64, 1))
    written = json.loads(path.read_text())
    assert [row["key"] for row in written["rows"]] == ["en0", "en1", "en2"] and written["machine"]["torch"]
    for row in written["rows"]:
        assert row["accelerated"] and row["language"] == "en" and row["seconds"] > 0
        assert row["flops"] > 0 and 0 <= row["edit_fraction"] <= 1 and row["flops_ratio_50"] > 1
        assert row["flops_ratio"] == pytest.approx(3 / 50 * row["flops_ratio_50"], rel=1e-4)  # of as many stock steps
    assert written["mean"]["count"] == 3 and written["kinds"]["color_alter"]["count"] == 2
    assert written["mean"]["flops"] == pytest.approx(np.mean([row["flops"] for row in written["rows"]]), rel=1e-4)
    assert written["settings"]["steps"] == 3 and "--preset turbo" in written["command"]
    lines = capsys.readouterr().out.splitlines()
    assert "FLOPs ratio" in lines[0] and "against" not in lines[0]
    assert [line.split()[:2] for line in lines[1:4]] == [["color_alter", "2"], ["subject-add", "1"], ["all", "3"]]


def test_imgedit_writes_the_scorers_files(imgedit_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert imgedit(imgedit_folder, out, *STOCK, "--cases", "2") == 0
    assert files(out) == ["1082.png", "673.png", "rows.jsonl"]
    assert [Image.open(out / name).size for name in ("1082.png", "673.png")] == [(64, 64), (96, 64)]
    said = capsys.readouterr().out
    assert "FLOPs" not in said and "stock pipeline" not in said  # of a stock run both would be noise


@pytest.mark.slow
def test_interrupted_run_is_resumed(write_gedit, gedit_rows, tmp_path, edited):
    folder, out, path = write_gedit(gedit_rows), tmp_path / "out", tmp_path / "gedit.json"
    assert gedit(folder, out, *STOCK, "--cases", "1") == 0
    assert gedit(folder, out, *STOCK, "--cases", "2") == 0
    assert edited == ["en0", "en1"]
    before = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(before + '{"key": "en2", "ki')  # stopped while it wrote
    (out / "fullset/color_alter/en/en1.png").unlink()
    (out / "fullset/color_alter/en/en0_SRCIMG.png").unlink()
    assert gedit(folder, out, *STOCK, "--language", "all", "--json", str(path)) == 0
    assert edited == ["en0", "en1", "en0", "cn0", "en1", "cn1", "en2", "cn2"]
    assert gedit(folder, out, *STOCK, "--language", "all") == 0 and len(edited) == 8
    keys = [row["key"] for row in json.loads(path.read_text())["rows"]]
    assert keys == ["en0", "cn0", "en1", "cn1", "en2", "cn2"]
    assert len((out / "rows.jsonl").read_text().splitlines()) == 1 + 8


@pytest.mark.slow
def test_one_key_may_name_tasks_of_several_kinds(write_gedit, gedit_rows, tmp_path, edited):
    rows = [row | {"key": "same"} for row in (gedit_rows[0], gedit_rows[4])]
    folder, out = write_gedit(rows), tmp_path / "out"
    assert gedit(folder, out, *STOCK) == gedit(folder, out, *STOCK) == 0
    assert edited == ["same", "same"] and (out / "fullset/subject-add/en/same.png").is_file()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seed", "1"), "with seed 0; this one has seed 1"),
        (("--steps", "2"), "with steps 1; this one has steps 2"),
        (("--preset", "turbo"), "with preset stock, restore None; this one has preset turbo, restore full"),
        (("--negative-prompt", "blue"), "with negative_prompt None; this one has negative_prompt blue"),
    ],
)
def test_other_settings_in_the_same_folder_are_rejected(imgedit_folder, tmp_path, capsys, more, says, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    settings = dict(benchmark="imgedit", model="kontext", preset="stock", restore=None, steps=1, seed=0)
    settings |= dict(negative_prompt=None)
    (out / "rows.jsonl").write_text(json.dumps({"settings": settings}) + "\n" + json.dumps({"key": "1"}) + "\n")
    monkeypatch.setattr("specedit.pipelines.load", lambda *_, **__: pytest.fail("a pipeline was loaded"))
    assert imgedit(imgedit_folder, out, *STOCK, *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_folder_without_pictures_accepts_another_run(imgedit_folder, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["eval", "imgedit", "--data", str(imgedit_folder), "--out", str(out), *STOCK, "--cases", "1"]
    assert cli.main([*given, "--model", str(tmp_path)]) == 2 and "model_index.json" in capsys.readouterr().err
    assert cli.main([*given, "--model", "kontext"]) == 0


@pytest.mark.slow
def test_against_an_earlier_run(imgedit_folder, tmp_path, capsys):
    first, path = tmp_path / "first", tmp_path / "x.json"
    assert imgedit(imgedit_folder, first, *STOCK) == 0
    assert imgedit(imgedit_folder, first, *STOCK, "--against", str(first), "--json", str(path)) == 0
    written = json.loads(path.read_text())
    assert [row["psnr_against"] for row in written["rows"]] == [60, 60, 60]
    assert written["kinds"]["style"]["psnr_against"] == 60 and written["against"]["preset"] == "stock"
    other = tmp_path / "other"
    assert imgedit(imgedit_folder, other, *STOCK, "--seed", "1", "--against", str(first), "--json", str(path)) == 0
    row = json.loads(path.read_text())["rows"][1]
    a, b = (np.asarray(Image.open(out / "673.png"), dtype=float) for out in (first, other))
    assert row["psnr_against"] == pytest.approx(10 * math.log10(255**2 / np.square(a - b).mean()), rel=1e-4)
    assert "against dB" in capsys.readouterr().out
    assert "psnr" not in (other / "rows.jsonl").read_text()  # depends on the other folder


@pytest.mark.slow
def test_incomparable_runs_are_rejected(imgedit_folder, tmp_path, capsys):
    first, other = tmp_path / "first", tmp_path / "other"
    assert imgedit(imgedit_folder, other, *STOCK, "--against", str(first)) == 2
    assert "expected the folder of an earlier run" in capsys.readouterr().err
    assert imgedit(imgedit_folder, first, *STOCK, "--cases", "1") == 0
    assert imgedit(imgedit_folder, other, *STOCK, "--against", str(first)) == 2
    assert "got none of 2, such as 673.png" in capsys.readouterr().err and not other.exists()
    Image.new("RGB", (32, 64)).save(first / "1082.png")
    assert imgedit(imgedit_folder, other, *STOCK, "--cases", "1", "--against", str(first)) == 2
    assert "1082.png, 32 x 64, got 64 x 64" in capsys.readouterr().err


@pytest.mark.slow
def test_every_task_uses_the_same_seed(imgedit_folder, tmp_path):
    whole, one = tmp_path / "whole", tmp_path / "one"
    assert imgedit(imgedit_folder, whole, *STOCK, "--cases", "2") == 0
    listed = imgedit_folder / "Basic" / "basic_edit.json"
    listed.write_text(json.dumps({"673": json.loads(listed.read_text())["673"]}))
    assert imgedit(imgedit_folder, one, *STOCK) == 0
    assert np.array_equal(*(np.asarray(Image.open(out / "673.png")) for out in (whole, one)))


def test_stock_runs_fifty_steps_and_a_preset_its_own(imgedit_folder, tmp_path, monkeypatch):
    from specedit import pipelines

    heard, load = [], pipelines.load

    def loading(*given, **named):
        pipe, prepare = load(*given, **named)
        stock = type(pipe).__call__

        def call(self, num_inference_steps=None, **more):
            heard.append(num_inference_steps)
            return stock(self, num_inference_steps=1, **more)

        monkeypatch.setattr(type(pipe), "__call__", call)
        return pipe, prepare

    monkeypatch.setattr(pipelines, "load", loading)
    out = tmp_path / "out"
    assert imgedit(imgedit_folder, out, "--preset", "stock", "--cases", "1") == 0
    assert heard == [50] and evaluation.read_settings(out)["steps"] == 50


@pytest.mark.slow
def test_a_preset_that_runs_stock_is_counted(imgedit_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specedit.method.adapter.supported", lambda scheduler: "a scheduler of another kind")
    out, path = tmp_path / "out", tmp_path / "x.json"
    with pytest.warns(UserWarning, match="a scheduler of another kind"):
        assert imgedit(imgedit_folder, out, *QUICK, "--cases", "2", "--json", str(path)) == 0
    said = capsys.readouterr().out
    assert "2 of 2 ran the stock pipeline" in said and "FLOPs" not in said
    written = json.loads(path.read_text())
    assert not any(row["accelerated"] for row in written["rows"]) and "flops" not in written["mean"]


@pytest.mark.slow
def test_uneditable_picture_names_its_task_and_keeps_other_rows(imgedit_folder, tmp_path, capsys):
    file = imgedit_folder / "Benchmark" / "singleturn" / "style" / "000278574.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    out = tmp_path / "out"
    assert imgedit(imgedit_folder, out, *STOCK) == 2
    error = capsys.readouterr().err
    assert "task 673.png: expected a picture that can be read in" in error
    file.unlink()
    assert imgedit(imgedit_folder, out, *STOCK) == 2
    assert "task 673.png: expected its picture" in capsys.readouterr().err
    assert files(out) == ["1082.png", "rows.jsonl"] and len((out / "rows.jsonl").read_text().splitlines()) == 2


def test_numbers_that_are_missing_or_not_finite():
    rows = [
        {"key": "a", "kind": "x", "seconds": 1.0, "accelerated": False},
        {"key": "b", "kind": "y", "seconds": 3.0, "accelerated": True, "flops": 2e12, "edit_fraction": 0.25},
    ]
    whole, kinds = evaluation.means(rows)
    assert whole == {"count": 2, "seconds": 2.0, "edit_fraction": 0.25, "flops": 2e12}
    assert kinds["x"] == {"count": 1, "seconds": 1.0}
    lines = evaluation.table(whole, kinds).splitlines()
    assert lines[0].split() == ["tasks", "edited", "TFLOPs", "seconds"]
    assert lines[1].split() == ["x", "1", "-", "-", "1.00"] and lines[3].split() == ["all", "2", "25%", "2.000", "2.00"]
    assert len({len(line) for line in lines}) == 1


def test_a_report_without_finite_numbers(imgedit_folder, tmp_path, monkeypatch):
    nothing = SimpleNamespace(flops=0.0, flops_ratio=math.inf, edit_fraction=math.nan)
    monkeypatch.setattr(evaluation, "last_report", lambda pipe: nothing)
    path = tmp_path / "x.json"
    assert imgedit(imgedit_folder, tmp_path / "out", *STOCK, "--cases", "1", "--json", str(path)) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["flops"] == 0 and "flops_ratio" not in row and "edit_fraction" not in row

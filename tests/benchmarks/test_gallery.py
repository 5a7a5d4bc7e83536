"""The gallery edits every task by every setting, and draws the edits above where they looked."""

import json

import pytest
from PIL import Image

from benchmarks import gallery
from specedit.cli.errors import CLIError
from specedit.micro.scenes import ALL_KINDS


def test_every_kind_has_a_task_and_textures_two():
    kinds = [case.kind for case in gallery.tasks(64).values()]
    assert sorted(set(kinds)) == sorted(ALL_KINDS) and kinds.count("texture") == 2 and len(kinds) == 8


@pytest.mark.thorough
def test_the_picture_and_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "PRESETS", (("ultra", "reference"),))
    file = tmp_path / "results.json"
    gallery.main(["--size", "128", "--only", "add", "--out", str(file), "--pictures", str(tmp_path)])
    stock, ultra = json.loads(file.read_text())["rows"]
    assert (stock["variant"], stock["nfe"], stock["flops_ratio"]) == ("stock, 28 steps", 28, 1.0)
    assert (ultra["variant"], ultra["nfe"], ultra["draft_steps"]) == ("ultra, reference", 9, 0)
    assert ultra["flops_ratio"] == pytest.approx(stock["flops"] / ultra["flops"], rel=1e-4) and ultra["flops_ratio"] > 2
    form, picture = gallery.FORM, Image.open(tmp_path / "gallery-kontext-add.jpg")
    assert picture.size == (form.side + 3 * form.tile, form.head + 2 * form.tile)  # input, stock, ultra
    cells = [picture.getpixel((form.side + form.tile * 2 + 5, form.head + form.tile * line + 5)) for line in (0, 1)]
    assert sum(cells[0]) > 2 * sum(cells[1])  # what was not edited is dark below


@pytest.mark.parametrize(("option", "value"), [("--size", "64"), ("--only", "nothing")])
def test_bad_options_stop_before_any_work(tmp_path, monkeypatch, option, value):
    monkeypatch.setattr(gallery, "editor", None)
    out = tmp_path / "results.json"
    with pytest.raises((SystemExit, CLIError), match=f"{option}: expected"):
        gallery.main(["--out", str(out), "--pictures", str(tmp_path), option, value])
    assert not out.exists()


def test_a_picture_that_cannot_be_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "LARGEST", 10)
    with pytest.raises(SystemExit, match="expected at most 10 bytes"):
        gallery.save(Image.new("RGB", (64, 64)), tmp_path / "picture.jpg")

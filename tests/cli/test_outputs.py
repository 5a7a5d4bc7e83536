"""Outputs are checked before any work, and written whole or not at all."""

import os

import numpy as np
import pytest
from PIL import Image

from specedit import cli
from specedit.evaluation import results
from specedit.io import files
from specedit.run_report import RunReport

PROMPT = "make it greyscale"


@pytest.mark.parametrize("option", ["--figure", "--compare"])
@pytest.mark.parametrize("other", ["out.png", "./out.png", "sub/../out.png", "link.png"])
def test_two_outputs_in_one_file_are_rejected(refused, picture, tmp_path, option, other):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "out.png")
    error = refused("edit", picture, PROMPT, "--out", "out.png", option, other)
    assert f"{option}: expected another file than --out, got {other.removeprefix('./')} for both" in error


def test_figure_and_comparison_in_one_file_are_rejected(refused, picture):
    error = refused("edit", picture, PROMPT, "--figure", "a.png", "--compare", "a.png")
    assert "--compare: expected another file than --figure, got a.png for both" in error


@pytest.mark.parametrize("option", ["--figure", "--compare"])
def test_output_over_the_input_is_rejected(refused, picture, option):
    assert f"{option}: expected another file than image" in refused("edit", picture, PROMPT, option, picture)


def test_output_over_the_mask_is_rejected(refused, picture, tmp_path):
    (tmp_path / "mask.png").write_bytes(picture.read_bytes())
    error = refused("edit", picture, PROMPT, "--mask", "mask.png", "--out", "mask.png")
    assert "--out: expected another file than --mask" in error


@pytest.mark.parametrize("option", ["--out", "--figure", "--compare"])
def test_folder_as_output_is_rejected(refused, picture, tmp_path, option):
    (tmp_path / "folder.png").mkdir()
    error = refused("edit", picture, PROMPT, option, "folder.png")
    assert f"{option}: expected a file to write, got the folder folder.png" in error


@pytest.mark.parametrize("option", ["--out", "--figure", "--compare"])
def test_output_below_a_file_is_rejected(refused, picture, tmp_path, option):
    (tmp_path / "taken").write_text("")
    error = refused("edit", picture, PROMPT, option, "taken/a.png")
    assert f"{option}: expected a folder, got the file {tmp_path / 'taken'}" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_protected_folder_is_rejected(refused, picture, tmp_path):
    (tmp_path / "protected").mkdir(mode=0o500)
    error = refused("edit", picture, PROMPT, "--out", "protected/a.png")
    assert "--out: expected a folder that can be written to" in error


def test_folder_without_permission_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="--out: expected a folder that can be written to, got"):
        files.check_writable("--out", tmp_path / "new" / "a.png")
    (tmp_path / "a.png").write_text("")
    with pytest.raises(
        ValueError, match=r"--out: expected a file that can be written, got .*a\.png, which is protected"
    ):
        files.check_writable("--out", tmp_path / "a.png")


@pytest.mark.parametrize("command", [["bench"], ["eval", "micro"], ["bench", "plan", "--measured"]])
def test_folder_as_result_file_is_rejected(refused, tmp_path, command):
    (tmp_path / "folder").mkdir()
    assert "--json: expected a file to write, got the folder folder" in refused(*command, "--json", "folder")


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.psd"])
def test_unwritable_format_is_rejected(refused, picture, name):
    for option in ("--out", "--compare"):
        assert f"expected a picture file such as out.png, got {name}" in refused("edit", picture, PROMPT, option, name)


def test_an_edit_may_replace_its_input(picture, editor, capsys):
    before = np.asarray(Image.open(picture))
    assert cli.main(["edit", str(picture), PROMPT, "--out", str(picture)]) == 0
    assert np.array_equal(np.asarray(Image.open(picture)), 255 - before)


def test_every_output_is_named(picture, editor, tmp_path, capsys):
    out, figure, compare = (tmp_path / name for name in ("new/out.png", "new/figure.svg", "compare.png"))
    given = ["--out", str(out), "--figure", str(figure), "--compare", str(compare)]
    assert cli.main(["edit", str(picture), PROMPT, *given]) == 0
    said = capsys.readouterr().out
    for path in (out, figure, compare):
        assert path.is_file() and f"wrote {path}" in said
    assert sorted(path.name for path in out.parent.iterdir()) == ["figure.svg", "out.png"]


def test_comparison_shows_before_after_and_edited_cells(picture, editor, tmp_path):
    compare = tmp_path / "compare.png"
    given = ["--out", str(tmp_path / "out.png"), "--compare", str(compare)]
    assert cli.main(["edit", str(picture), PROMPT, *given]) == 0
    sheet, before = np.asarray(Image.open(compare)), np.asarray(Image.open(picture))
    assert sheet.shape == (64, 3 * 96 + 2 * 8, 3)
    first, second, third = sheet[:, :96], sheet[:, 104:200], sheet[:, 208:]
    assert np.array_equal(first, before) and np.array_equal(second, 255 - before)
    assert (sheet[:, 96:104] == 255).all() and (sheet[:, 200:208] == 255).all()
    assert np.abs(third[:32, :48].astype(int) - second[:32, :48]).max() <= 1
    assert third[40:, 60:].mean() < 0.3 * second[40:, 60:].mean()


def test_the_comparison_of_a_stock_run_has_two_pictures(picture, editor, tmp_path, capsys):
    editor.report = None
    compare = tmp_path / "compare.png"
    given = ["--out", str(tmp_path / "out.png"), "--compare", str(compare), "--figure", str(tmp_path / "f.png")]
    assert cli.main(["edit", str(picture), PROMPT, *given]) == 0
    assert Image.open(compare).size == (2 * 96 + 8, 64) and not (tmp_path / "f.png").exists()
    said = capsys.readouterr()
    assert "because the stock pipeline ran" in said.err and "before | after\n" in said.out


@pytest.mark.parametrize("option", ["--out", "--figure", "--compare"])
def test_a_failing_write_leaves_the_old_file(picture, editor, tmp_path, capsys, monkeypatch, option):
    old = tmp_path / "old.png"
    old.write_text("old")
    kept = {"--out": str(tmp_path / "out.png"), option: str(old)}

    def fail(self, file, *_, **__):
        (file.write(b"half") if hasattr(file, "write") else file.write_text("half"))
        raise OSError(28, "No space left on device")

    if option == "--figure":
        monkeypatch.setattr(RunReport, "save_figure", fail)
    else:
        save = Image.Image.save
        wide = 96 if option == "--out" else 304
        monkeypatch.setattr(
            Image.Image, "save", lambda self, *a, **k: (fail if self.width == wide else save)(self, *a, **k)
        )
    assert cli.main(["edit", str(picture), PROMPT, *(word for pair in kept.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert old.read_text() == "old" and not list(tmp_path.glob(".specedit-*"))


def test_a_failing_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda *_: pytest.fail("moved"))
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half \udcff")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_replacing_keeps_links_and_permissions(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    results.write(link, "command", [{"x": 1}])
    assert link.is_symlink() and '"command": "command"' in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640


def test_results_can_go_to_devices():
    files.write_text("/dev/null", "text")
    assert not os.path.isfile("/dev/null")

"""Readers of public benchmarks: which tasks, in which order, with which pictures, and what is said of broken copies."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from specedit.evaluation import tasks


def test_gedit_tasks_name_the_scorers_files(write_gedit, gedit_rows, picture):
    found = tasks.gedit(write_gedit(gedit_rows))
    assert [(t.key, t.kind, t.prompt, t.language) for t in found] == [
        ("en0", "color_alter", "make it red 0", "en"),
        ("en1", "color_alter", "make it red 1", "en"),
        ("en2", "subject-add", "make it red 2", "en"),
    ]
    assert found[2].output == Path("fullset/subject-add/en/en2.png")
    assert found[2].source_output == Path("fullset/subject-add/en/en2_SRCIMG.png")
    for i, task in enumerate(found):  # the editor gets the raw picture, the scorer the other
        assert np.array_equal(task.image(), picture(64, 96, i)) and np.array_equal(task.source(), picture(64, 64, i))


@pytest.mark.parametrize(("language", "keys"), [("cn", "cn0 cn1 cn2"), ("all", "en0 cn0 en1 cn1 en2 cn2")])
def test_gedit_reads_other_languages(write_gedit, gedit_rows, language, keys):
    found = tasks.gedit(write_gedit(gedit_rows), language)
    assert [task.key for task in found] == keys.split()
    assert found[0].prompt == ("变红 0" if language == "cn" else "make it red 0")


def test_pictures_are_read_a_row_group_at_a_time(write_gedit, gedit_rows, monkeypatch):
    from pyarrow import parquet

    read = []

    class Counting(parquet.ParquetFile):
        def read_row_group(self, group, columns=None):
            read.append((group, "input_image" in columns))
            return super().read_row_group(group, columns=columns)

    monkeypatch.setattr(parquet, "ParquetFile", Counting)
    found = tasks.gedit(write_gedit(gedit_rows), "all")
    assert read == [(0, False), (1, False), (0, False)]  # no picture yet
    for task in found:
        task.image(), task.source()
    assert read[3:] == [(0, True), (1, True), (0, True)]


def test_gedit_with_one_kind_of_picture(write_gedit, gedit_rows, picture):
    without = [{name: value for name, value in row.items() if name != "input_image_raw"} for row in gedit_rows]
    assert np.array_equal(tasks.gedit(write_gedit(without))[1].image(), picture(64, 64, 1))
    nothing = [row | {"input_image_raw": {"bytes": None, "path": "x.png"}} for row in gedit_rows]
    assert np.array_equal(tasks.gedit(write_gedit(nothing, "nothing"))[1].image(), picture(64, 64, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_pictures_of_any_mode_become_rgb(write_gedit, gedit_rows, picture, encoded, mode):
    gedit_rows[0]["input_image_raw"] = {"bytes": encoded(picture(64, 96).convert(mode)), "path": None}
    image = tasks.gedit(write_gedit(gedit_rows[:1]))[0].image()
    assert image.mode == "RGB" and image.size == (96, 64)
    assert np.array_equal(image, picture(64, 96).convert(mode).convert("RGB"))


def test_photographs_are_rotated_by_exif(write_gedit, gedit_rows, picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right
    gedit_rows[0]["input_image_raw"] = {"bytes": encoded(picture(64, 96), "JPEG", exif=exif), "path": None}
    assert tasks.gedit(write_gedit(gedit_rows[:1]))[0].image().size == (64, 96)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": "../../../x"}, "train-00000.parquet: expected a key that can name a file, got '../../../x'"),
        ({"key": None}, "expected a key that can name a file, got None"),
        ({"task_type": ""}, "expected a task_type that can name a file, got ''"),
        ({"instruction": "  "}, "task fullset/color_alter/en/en0.png: expected an instruction in"),
        ({"key": "en1"}, "--data: expected every task once, got fullset/color_alter/en/en1.png twice in"),
    ],
)
def test_gedit_rows_without_tasks_are_rejected(write_gedit, gedit_rows, change, says):
    gedit_rows[0] |= change
    with pytest.raises(ValueError) as error:
        tasks.gedit(write_gedit(gedit_rows))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda whole: b"not a picture", "expected a picture that can be read in"),
        (lambda whole: whole[: len(whole) // 2], "expected a picture that can be read in"),
        (lambda whole: None, "expected a picture in"),
    ],
)
def test_a_gedit_picture_that_cannot_be_read_names_file_and_task(write_gedit, gedit_rows, spoil, says):
    held = {"bytes": spoil(gedit_rows[4]["input_image"]["bytes"]), "path": "x.png"}
    gedit_rows[4] |= {"input_image": held, "input_image_raw": held}
    found = tasks.gedit(write_gedit(gedit_rows))
    assert found[0].image().size == (96, 64)
    with pytest.raises(ValueError) as error:
        found[2].image()
    assert all(part in str(error.value) for part in (says, "fullset/subject-add/en/en2.png", "train-00004.parquet"))


def test_folders_without_gedit_are_rejected(write_gedit, gedit_rows, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with the parquet files of stepfun-ai/GEdit-Bench"):
        tasks.gedit(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty, which holds none"):
        tasks.gedit(tmp_path / "empty")
    (tmp_path / "empty" / "train.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"train.parquet: expected a parquet file that can be read"):
        tasks.gedit(tmp_path / "empty")
    unlike = write_gedit([{"key": "a", "caption": "b"}], "unlike")
    with pytest.raises(ValueError, match="without input_image, instruction, instruction_language, task_type"):
        tasks.gedit(unlike)
    with pytest.raises(ValueError, match=r"--language: expected one that .* has tasks in, en, got cn"):
        tasks.gedit(write_gedit(gedit_rows[::2], "english"), "cn")


def test_gedit_without_rows_is_rejected(gedit_rows, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(gedit_rows).slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"expected tasks, got .* which holds none"):
        tasks.gedit(tmp_path)


def test_without_pyarrow_the_error_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow") as error:
        tasks.gedit(tmp_path)
    assert "\n" not in str(error.value)


def test_imgedit_tasks_in_the_order_of_the_list(imgedit_folder, picture):
    found = tasks.imgedit(imgedit_folder)
    assert [(t.key, t.kind, t.prompt, str(t.output)) for t in found] == [
        ("1082", "adjust", "make it red", "1082.png"),
        ("673", "style", "make it blue", "673.png"),
        ("68", "adjust", "make it green", "68.png"),
    ]
    assert all(task.language is task.source is task.source_output is None for task in found)
    assert np.array_equal(found[1].image(), picture(64, 96, 1)) and found[2].image().size == (128, 64)


def test_imgedit_reads_the_archives_layout(imgedit_folder):
    listed = imgedit_folder / "Basic" / "basic_edit.json"
    inside = imgedit_folder / "Benchmark" / "singleturn" / "singleturn.json"
    items = json.loads(listed.read_text())
    inside.write_text(json.dumps({"673": items["673"]}))
    assert [task.key for task in tasks.imgedit(imgedit_folder)] == ["1082", "673", "68"]
    listed.unlink()
    assert [task.key for task in tasks.imgedit(imgedit_folder)] == ["673"]


def test_imgedit_finds_the_folder_that_holds_the_pictures(imgedit_folder, picture):
    few = imgedit_folder / "A" / "style" / "000278574.png"  # some other folder with one of that name
    few.parent.mkdir(parents=True)
    picture(64, 64, 9).save(few)
    assert np.array_equal(tasks.imgedit(imgedit_folder)[1].image(), picture(64, 96, 1))


def test_an_imgedit_picture_that_is_missing_or_broken_names_file_and_task(imgedit_folder):
    file = imgedit_folder / "Benchmark" / "singleturn" / "style" / "000278574.png"
    file.unlink()
    task = tasks.imgedit(imgedit_folder)[1]
    with pytest.raises(ValueError, match=r"task 673.png: expected its picture .*000278574.png, which does not exist"):
        task.image()
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"task 673.png: expected a picture that can be read in .*000278574.png"):
        task.image()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected JSON"),
        ("[]", "got a list"),
        ("{}", "expected tasks"),
        ('{"a": {"id": "x.png", "prompt": "p"}}', '"edit_type" of task a'),
        ('{"a": {"id": "x.png", "prompt": "p", "edit_type": "add"}}', "such as x.png"),
        ('{"a": {"id": "animal/000342021.jpg", "prompt": "", "edit_type": "add"}}', "task a.png: expected an instruct"),
        ('{"../a": {"id": "animal/000342021.jpg", "prompt": "p", "edit_type": "add"}}', "expected a key that can name"),
    ],
)
def test_invalid_imgedit_lists_are_rejected(imgedit_folder, content, says):
    (imgedit_folder / "Basic" / "basic_edit.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        tasks.imgedit(imgedit_folder)
    assert says in str(error.value)


def test_folders_without_imgedit_are_rejected(imgedit_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"basic_edit.json of PKU-YuanGroup/ImgEdit, got .*which holds none"):
        tasks.imgedit(imgedit_folder / "Benchmark" / "singleturn")
    (imgedit_folder / "basic_edit.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"expected one basic_edit.json, got .* and "):
        tasks.imgedit(imgedit_folder)


def test_pictures_are_read_as_a_viewer_shows_them(write_gedit, gedit_rows, encoded, capsys):
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (0, 0, 32, 64))
    deep = Image.fromarray(np.full((64, 64), 100 * 257, np.uint16))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 64), "red")]}
    gedit_rows[0]["input_image_raw"] = {"bytes": encoded(hidden), "path": None}
    gedit_rows[2]["input_image_raw"] = {"bytes": encoded(deep), "path": None}
    gedit_rows[4]["input_image_raw"] = {"bytes": encoded(Image.new("RGB", (64, 64)), "GIF", **frames), "path": None}
    first, second, third = (task.image() for task in tasks.gedit(write_gedit(gedit_rows)))
    assert first.mode == "RGB" and first.getpixel((60, 60)) == (255, 255, 255) and first.getpixel((1, 1)) == (0, 0, 255)
    assert second.getpixel((1, 1)) == (100, 100, 100) and third.size == (64, 64)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("specedit: task fullset/subject-add/en/en2.png: ")
    assert said[0].endswith("the first of 2 frames is read")

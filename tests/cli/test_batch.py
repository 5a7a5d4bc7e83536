"""`specedit batch`: rows in, pictures and a results file out, whatever happens in between."""

import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import specedit
from specedit import cli, pipelines
from specedit.batch import jobs, planning, prediction, results, running, sources
from specedit.batch.results import FILE, JOURNAL, NAMES
from specedit.cost import roofline
from specedit.io import pictures

GREY = "make it greyscale"


@pytest.fixture
def rows(tmp_path):
    """Writes pictures of these sizes and a JSONL file of one row each, with further columns."""

    def write(*more, sizes=None, name="rows.jsonl"):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        lines = []
        for number, columns in enumerate(more):
            size = (64, 48) if sizes is None else sizes[number]
            Image.new("RGB", size, (10 * number, 99, 7)).save(folder / f"{number}.png")
            lines.append(json.dumps({"image": f"{number}.png", "prompt": GREY, **columns}))
        (folder / name).write_text("\n".join(lines) + "\n")
        return folder / name

    return write


@pytest.fixture
def batch(tmp_path, capsys):
    """Runs the command; returns exit code, what it printed, and the results by id."""

    def run(source, *options, out=None):
        out = tmp_path / "out" if out is None else out
        code = cli.main(["batch", str(source), "--out", str(out), *map(str, options)])
        found = parquet.read_table(out / FILE).to_pylist() if (out / FILE).exists() else []
        return code, capsys.readouterr(), {row["id"]: SimpleNamespace(**row) for row in found}

    return run


def files(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_rows_become_pictures_and_results(batch, rows, editor, tmp_path):
    source = rows({"id": "a"}, {"id": "b", "out": "deep/b.jpg", "seed": 7}, {"id": "c", "source_page": "kept out"})
    code, said, found = batch(source)
    assert code == 0 and list(found) == ["a", "b", "c"] and "columns that nothing reads: source_page" in said.err
    assert files(tmp_path / "out") == ["a.png", "b.jpg", "c.png", "deep", FILE]
    row = found["b"]
    assert set(vars(row)) == set(NAMES) and (row.status, row.error, row.seed) == ("done", None, 7)
    assert row.output == str(tmp_path / "out" / "deep" / "b.jpg") and row.seconds > 0
    assert (row.flops_ratio, row.edit_fraction, row.nfe) == (10, 0.25, 9)
    assert Image.open(tmp_path / "out" / "a.png").getpixel((0, 0)) == (255, 156, 248)


def test_settings_of_a_row_override_those_of_the_command(batch, rows, editor):
    source = rows(
        {"preset": "turbo"}, {"settings": {"threshold": 0.3, "steps": 7}}, {"settings": '{"steps": [1, 2, 3]}'}, {}
    )
    assert batch(source, "--preset", "fast", "--keep-pixels", "--steps", 12)[0] == 0
    calls = {tuple(call["image"].getpixel((0, 0))): call["num_inference_steps"] for call in editor.calls}
    assert [calls[10 * number, 99, 7] for number in range(4)] == [12, 7, 50, 12]
    assert all(config.keep_pixels for config in editor.configs)
    assert {config.steps for config in editor.configs} == {(2, 2, 5), (3, 3, 5), (1, 2, 3)}
    assert {config.threshold for config in editor.configs} > {0.3}


def test_rows_of_one_size_and_setting_run_side_by_side(batch, rows, editor):
    large, small = (96, 64), (64, 48)
    source = rows({}, {"preset": "fast"}, {}, {"preset": "fast"}, sizes=[large, small, large, small])
    assert batch(source)[0] == 0
    assert [call["image"].size for call in editor.calls] == [large, large, small, small] and len(editor.configs) == 2


def test_row_errors_stop_no_other_row_and_are_tried_again(batch, rows, editor, tmp_path):
    wrong = [
        {"image": "gone.png"}, {"image": "rows.jsonl"}, {"image": 7}, {"preset": "fats"}, {"steps": 0}, {"seed": -1},
        {"settings": {"dilution": 1}}, {"settings": "["}, {"prompt": " "}, {"prompt": "frobnicate the circle"},
        {"mask": "gone.png"}, {"out": "../b.png"}, {"out": "b.xyz"}, {"size": 9},
        {"true_cfg_scale": 2, "negative_prompt": 3},
    ]  # fmt: skip
    source = rows(*({"id": f"bad{number}", **columns} for number, columns in enumerate(wrong)), {"id": "good"})
    source.write_text(source.read_text() + "{not JSON\n")
    code, said, found = batch(source)
    assert code == 3 and found["good"].status == "done" and len(editor.calls) == 1
    expected = [
        "image: expected a picture file, got gone.png, which does not exist", "expected a picture that can be read",
        "image: expected the path of a picture, got 7", "did you mean 'fast'", "steps: expected a whole number from 1",
        "seed: expected a whole number", "got 'dilution'; did you mean 'dilation'", "settings: expected a JSON object",
        "prompt: expected what to change, got ' '", 'got "frobnicate"', "mask: expected a picture file, got gone.png",
        "out: expected a file name, or a path below", "expected a picture file such as b.png", "size: expected a whole",
        "negative_prompt: expected a text, got 3",
    ]  # fmt: skip
    for number, message in enumerate(expected):
        row = found[f"bad{number}"]
        assert row.status == "error" and message in row.error and row.output is None
        assert f"specedit: bad{number}: " in said.err
    assert "16 rows failed; run the command again to try only these" in said.err and "line 17" not in said.out
    assert files(tmp_path / "out") == ["good.png", FILE]
    lines = [json.loads(line) for line in source.read_text().splitlines()[:-1]]
    source.write_text(
        json.dumps({"id": lines[0]["id"], "image": "0.png", "prompt": GREY}) + "\n" + json.dumps(lines[-1])
    )
    code, _, found = batch(source)
    assert code == 0 and len(editor.calls) == 2 and [row.status for row in found.values()] == ["done", "done"]


def test_an_edit_that_fails_is_a_row_error(batch, rows, editor, monkeypatch):
    def load(*_, **__):
        def prepare(image):
            if image.size == (96, 64):
                raise RuntimeError("no\nmemory")
            return image, {}

        return editor, prepare

    monkeypatch.setattr(pipelines, "load", load)
    code, _, found = batch(rows({"id": "a"}, {"id": "b"}, sizes=[(96, 64), (64, 48)]))
    assert code == 3 and (found["a"].error, found["b"].status) == ("no memory", "done")


def test_ctrl_c_leaves_whole_files_and_the_next_run_resumes(batch, rows, editor, monkeypatch, tmp_path):
    source, call = rows(*({"id": name} for name in "abcd")), type(editor).__call__

    def stop(self, *given, **named):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return call(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(editor), "__call__", stop)
        code, said, found = batch(source)
    assert code == 130 and "2 of 4 rows ran; run the same command again to resume" in said.err
    assert list(found) == ["a", "b"] and files(tmp_path / "out") == ["a.png", "b.png", FILE]
    code, said, found = batch(source)
    assert code == 0 and list(found) == list("abcd") and len(editor.calls) == 4 and "2 of them done before" in said.out
    assert batch(source)[0] == 0 and len(editor.calls) == 4
    (tmp_path / "out" / "b.png").unlink()
    assert batch(source)[0] == 0 and len(editor.calls) == 5


def test_workers_that_cannot_start_leave_nothing(rows, tmp_path):
    """As where the actors of a cluster do not find the model."""
    source, out = rows({"id": "a"}), tmp_path / "out"
    records, folder = sources.read(source)
    held = results.Folder(out)
    plan = planning.plan(source, records, jobs.Rules(folder=folder), held)

    def fail(todo):
        raise ValueError("no model")
        yield

    with pytest.raises(ValueError, match="no model"):
        running.run(plan, held, fail)
    assert files(out) == []

    def stop(todo):
        (out / "a.png").write_bytes(b"an actor wrote it, and was stopped before it said so")
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        running.run(plan, held, stop)
    assert planning.plan(source, records, jobs.Rules(folder=folder), results.Folder(out)).todo
    summary = running.run(plan, held, lambda todo: iter(()))
    assert [row.id for row in summary.failed] == ["a"] and "expected a result, got none" in summary.failed[0].error
    double = results.Result("a", "")
    summary = running.run(plan, held, lambda todo: (row for row in (double, double)))
    assert summary.edited == 1 and summary.results[0].row == plan.order[0][1]


def test_a_killed_run_resumes_from_its_journal(batch, rows, editor, tmp_path):
    source, out = rows(*({"id": name} for name in "abc")), tmp_path / "out"
    assert batch(source)[0] == 0
    lines = [json.dumps(row) for row in parquet.read_table(out / FILE).to_pylist()]
    (out / FILE).unlink()
    (out / JOURNAL).write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:40]}")
    (out / ".specedit-0123456789ab.part.png").write_bytes(b"half a picture")
    code, _, found = batch(source)
    assert code == 0 and list(found) == list("abc") and len(editor.calls) == 4
    assert files(out) == ["a.png", "b.png", "c.png", FILE]


def test_rows_without_id_are_known_by_their_place_and_content(batch, rows, editor):
    _, _, found = batch(rows({}, {}))
    assert [name[:7] for name in found] == ["000000-", "000001-"]
    assert batch(rows({}, {}, {"seed": 3}))[0] == 0 and len(editor.calls) == 3


def test_folder_and_parquet(batch, rows, editor, tmp_path):
    source = rows({}, {})
    code, _, found = batch(source.parent, "--prompt", GREY, out=tmp_path / "first")
    assert code == 0 and list(found) == ["0", "1"] and files(tmp_path / "first") == ["0.png", "1.png", FILE]
    table = {"picture": ["0.png", "1.png"], "prompt": [GREY, None], "seed": [None, 5.0], "id": [1, 2]}
    partition = tmp_path / "in" / "seed=9"
    partition.mkdir()
    table["picture"] = [str(source.parent / name) for name in table["picture"]]
    parquet.write_table(pyarrow.table(table), partition / "rows.parquet")
    code, _, found = batch(partition / "rows.parquet", "--prompt", "remove the circle", out=tmp_path / "second")
    assert code == 0 and [row.seed for row in found.values()] == [0, 5] and list(found) == ["1", "2"]
    assert [call["prompt"] for call in editor.calls[2:]] == [GREY, "remove the circle"]


def test_pictures_inside_a_parquet_file(batch, editor, tmp_path):
    """Bytes, and the form in which Hugging Face's data sets hold pictures."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    held = [{"bytes": file.getvalue(), "path": None}] * 2 + [{"bytes": b"no picture", "path": None}]
    parquet.write_table(pyarrow.table({"image": held, "prompt": [GREY] * 3, "seed": [1, 2, 1]}), tmp_path / "x.parquet")
    code, _, found = batch(tmp_path / "x.parquet")
    assert code == 3 and [row.status for row in found.values()] == ["done", "done", "error"]
    assert editor.calls[0]["image"].size == (64, 48)


def test_size_is_read_from_the_header_and_planned(tmp_path):
    turned = Image.new("RGB", (64, 48)).getexif()
    turned[pictures.ORIENTATION] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.jpg", exif=turned)
    assert pictures.size(tmp_path / "turned.jpg") == (48, 64) == pictures.read(tmp_path / "turned.jpg").image.size
    assert pipelines.planned_size(4000, 1000, embedded=True) == (512, 128)
    assert pipelines.planned_size(4000, 1000, embedded=True, largest=320) == (320, 80)
    assert pipelines.planned_size(4000, 1000, embedded=False) == (2048, 512)
    assert pipelines.planned_size(4000, 1000, embedded=False, largest=1600) == (1600, 400)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([{"image": None}], [], "expected a column image, got prompt"),
        ([{"prompt": None}], [], "expected a column prompt, or --prompt for all rows, got image"),
        ([{"picture": "0.png"}], [], "expected one column with pictures, got both"),
        ([{"sed": 3}], [], "got 'sed'; did you mean 'seed'?"),
        ([{"id": "a"}, {"id": "a"}], [], "id: expected another for each row, got a for line 1 and line 2"),
        ([{"out": "a.png"}, {"out": "./a.png"}], [], "out: expected another file for each row, got a.png for line 1"),
        ([{}], ["--prompt", " "], "--prompt: expected what to change"),
        ([{}], ["--model", "nowhere"], "--model: expected kontext, qwen, a pipeline folder or a hub id"),
        ([{}], ["--actors", "2"], "--actors: expected --ray with it"),
        ([{}], ["--edited", "2"], "--edited: expected --dry-run with it"),
        ([{}], ["--steps", "0"], "--steps: expected a whole number from 1"),
        ([{}], ["--preset", "turbo", "--threshold", "nan"], "--threshold: expected a number from 0"),
        ([{}], ["--dry-run", "--gpu", "H1"], "--gpu: expected one of A100, H100, H200, B200, got 'H1'"),
    ],
)
def test_wrong_input_is_refused_before_any_work(refused, rows, tmp_path, columns, options, message):
    assert message in refused("batch", rows(*columns), "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"image", "expected a folder, or a file .jsonl, .ndjson, .parquet, got"),
        ("gone.jsonl", None, "which does not exist"),
        ("rows.jsonl", b"", "expected rows, got none"),
        ("rows.jsonl", b"\xff\xfe\x00", "expected JSON objects in UTF-8"),
        ("rows.jsonl", b"[1]\n2", "expected JSON objects, one a line; line 1: expected a JSON object, got [1]"),
        ("rows.parquet", b"PAR1", "expected a Parquet file, got one that cannot be read"),
        ("empty", None, "expected pictures, got none"),
    ],
)
def test_unreadable_sources_are_refused(refused, tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    elif name == "empty":
        source.mkdir()
    assert message in refused("batch", source, "--out", tmp_path / "out", "--prompt", GREY)
    assert not (tmp_path / "out").exists()


def test_other_results_are_not_mixed_or_overwritten(batch, rows, editor, tmp_path, capsys):
    out, first = tmp_path / "out", rows({"id": "a"}, {"id": "b"})
    assert batch(first)[0] == 0
    before = (out / FILE).read_bytes()
    code, said, _ = batch(rows({"id": "c"}, name="other.jsonl"))
    assert code == 2 and "got those of other rows: a, b; choose another folder, or --overwrite" in said.err
    code, said, _ = batch(first, "--preset", "fast")
    assert code == 2 and "got those of these rows with other settings: a, b" in said.err
    assert (out / FILE).read_bytes() == before and len(editor.calls) == 2
    code, _, found = batch(first, "--preset", "fast", "--overwrite")
    assert code == 0 and len(editor.calls) == 4 and list(found) == ["a", "b"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.png").write_bytes(b"mine")
    code, said, _ = batch(first, out=foreign)
    assert code == 2 and "expected a folder without other results, got" in said.err and files(foreign) == ["a.png"]
    parquet.write_table(pyarrow.table({"mine": [1]}), foreign / FILE)
    assert cli.main(["batch", str(first), "--out", str(foreign), "--overwrite"]) == 2
    assert "which no batch wrote" in capsys.readouterr().err
    assert parquet.read_table(foreign / FILE).column_names == ["mine"]
    (foreign / FILE).unlink()
    (foreign / JOURNAL).write_text("no journal\n")
    assert cli.main(["batch", str(first), "--out", str(foreign)]) == 2
    assert "--out: expected a journal that can be read, got" in capsys.readouterr().err


def test_pictures_are_not_overwritten_by_their_edits(refused, rows):
    source = rows({})
    message = refused("batch", source.parent, "--prompt", GREY, "--out", source.parent, "--overwrite")
    assert "--out: expected another folder than the pictures'" in message


@pytest.mark.slow
def test_dry_run_predicts_and_writes_nothing(batch, rows, tmp_path, refused):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 32))
    source = rows({}, {}, {"mask": "mask.png"}, {"image": "gone.png"}, sizes=[(64, 64)] * 4)
    mask.save(source.parent / "mask.png")
    code, said, _ = batch(source, "--preset", "turbo", "--dry-run", "--edited", 50)
    assert code == 3 and not (tmp_path / "out").exists()
    lines = [line.split() for line in said.out.splitlines() if " x " in line]
    assert [(line[0], line[5]) for line in lines] == [("2", "50%"), ("1", "25%")]
    assert "at least" in said.out and "this machine" in said.out and "gone.png" in said.err
    code, said, _ = batch(source.parent, "--model", "owner/other", "--prompt", "x", "--dry-run")
    assert code == 2 and "--dry-run: expected a model whose cost is known" in said.err


@pytest.mark.slow
def test_dry_run_of_other_methods(batch, rows):
    _, said, _ = batch(rows({"method": "ralu"}), "--dry-run")
    (line,) = [line.split() for line in said.out.splitlines() if " x " in line]
    assert line[4].startswith("ralu") and line[0] == "1"
    code, said, _ = batch(rows({"method": "sparge"}), "--dry-run")
    assert code == 2 and "method: 'sparge' reads as many blocks of keys as the picture calls for" in said.err


def test_dry_run_lists_rows_whose_masks_cannot_be_used(batch, rows):
    source = rows({"id": "a"}, {"id": "empty", "mask": "e.png"}, {"id": "text", "mask": "t.png"}, {"image": "gone.png"})
    Image.new("L", (64, 48)).save(source.parent / "e.png")
    (source.parent / "t.png").write_text("no picture")
    code, said, _ = batch(source, "--preset", "turbo", "--dry-run")
    assert code == 3 and [line.split()[0] for line in said.out.splitlines() if " x " in line] == ["1"]
    assert "empty: edit_mask: expected some nonzero pixels" in said.err and "text: " in said.err
    assert "3 rows failed" in said.err


def test_pictures_of_one_name_keep_their_suffixes(tmp_path):
    for name in ("x.png", "x.jpg", "y.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    assert [record.values["id"] for record in sources.read(tmp_path)[0]] == ["x.jpg", "x.png", "y"]


@pytest.mark.parametrize(
    ("model", "name", "guided", "passes"),
    [
        ("black-forest-labs/FLUX.1-Kontext-dev", "flux-kontext", {}, 1),
        ("black-forest-labs/FLUX.2-klein-4B", "flux2-klein-4b", {}, 1),
        ("black-forest-labs/FLUX.2-klein-9B-KV", "flux2-klein-9b-kv", {}, 1),
        ("Qwen/Qwen-Image-2.1", "qwen-image-2.1", {}, 1),
        ("Qwen/Qwen-Image-Edit", "qwen-image-edit", {}, 1),
        ("Qwen/Qwen-Image-Edit", "qwen-image-edit", {"negative_prompt": " "}, 2),
    ],
)
def test_dry_run_of_a_released_model(rows, monkeypatch, model, name, guided, passes):
    """The plan and the roofline of a megapixel of the picture's shape, with the guidance that runs."""
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda *_: 1 / 0)  # as without a network
    source = rows({"preset": "fast", **guided}, sizes=[(300, 150)])
    record, folder = sources.read(source)
    (group,), failed = prediction.predict(
        [jobs.Rules(model, folder=folder).job(record[0])], prediction.cost_of(model), edited=0.3, gpu="H100"
    )
    assert group.size == (1440, 720) and not failed
    cost = dataclasses.replace(specedit.flops.MODELS[name], passes=passes)
    assert group.flops == specedit.flops.plan("fast", cost, 720, 1440, 0.3)["flops"]
    usual = roofline.predict_roofline("fast", name, 720, 1440, 0.3, "H100")["seconds"]
    assert group.seconds == pytest.approx(usual * (passes / specedit.flops.MODELS[name].passes), rel=0.1)


@pytest.mark.slow
def test_dry_run_counts_what_the_run_counts(batch, rows, capsys):
    source = rows({"id": "a"}, sizes=[(64, 64)])
    Image.new("L", (64, 64), 255).crop((0, 0, 64, 64)).save(source.parent / "mask.png")
    source.write_text(json.dumps({"id": "a", "image": "0.png", "prompt": GREY, "mask": "mask.png"}) + "\n")
    options = ["--preset", "turbo", "--steps", 3]
    _, said, _ = batch(source, *options, "--dry-run")
    predicted = float(next(line for line in said.out.splitlines() if " x " in line).split()[-2].rstrip("x"))
    code, _, found = batch(source, *options)
    # The report compares with the steps that the call asks for, the plan with the model's default of 28.
    assert code == 0 and found["a"].nfe == 3
    assert predicted == pytest.approx(found["a"].flops_ratio * 28 / 3, abs=0.01)


@pytest.mark.slow
def test_a_row_gives_the_picture_that_edit_gives(batch, rows, tmp_path, capsys):
    source = rows({"id": "a", "seed": 3}, sizes=[(96, 64)])
    assert batch(source, "--preset", "turbo", "--steps", 2)[0] == 0
    one = tmp_path / "one.png"
    options = ["--preset", "turbo", "--steps", "2", "--seed", "3", "--out", str(one)]
    assert cli.main(["edit", str(source.parent / "0.png"), GREY, *options]) == 0
    assert np.array_equal(Image.open(one), Image.open(tmp_path / "out" / "a.png"))


def test_ray_that_is_missing_is_one_line(refused, rows, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused("batch", rows({}), "--out", tmp_path / "out", "--ray")
    assert 'pip install "specedit[ray]"' in message and not (tmp_path / "out").exists()


def test_public_names_need_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    from specedit.integrations.ray import Editor

    with pytest.raises(ValueError, match="settings: expected known names, got 'presett'"):
        Editor(presett="turbo")
    assert specedit.__version__

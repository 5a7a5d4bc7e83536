"""The command line: what it writes, and one line with exit code 2 for what goes wrong."""

import json
import logging
import subprocess
import sys
import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from specedit import cli, micro, pipelines
from specedit.cli import shared
from specedit.config import STANDARD_RESTORES
from specedit.evaluation.results import fingerprint
from specedit.micro import scenes
from specedit.micro.loading import WEIGHTS


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    scenes.sample(4, 128).source.save(path)
    return path


@pytest.mark.slow
def test_demo(shallow_editors, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("specedit.micro.demonstration.STOCK_STEPS", 2)
    assert cli.main(["demo", "--size", "128", "--out", str(tmp_path / "demo")]) == 0
    for name in ("demo.png", "report.png", "input.png", "stock.png", "specedit.png"):
        assert Image.open(tmp_path / "demo" / name).size[0] >= 128
    out = capsys.readouterr().out
    assert "FLOPs" in out and "seconds" in out and "demo.png" in out


@pytest.mark.slow
def test_the_qwen_editor_by_name(shallow_editors, monkeypatch, tmp_path, picture, capsys):
    monkeypatch.setattr("specedit.micro.demonstration.STOCK_STEPS", 2)
    out = tmp_path / "demo"
    assert cli.main(["demo", "--model", "qwen", "--size", "128", "--out", str(out)]) == 0
    assert Image.open(out / "specedit.png").size == Image.open(out / "stock.png").size == (128, 128)
    path = tmp_path / "eval.json"
    given = ["eval", "micro", "--model", "qwen", "--preset", "stock", "--steps", "2", "--cases", "1", "--size", "64"]
    assert cli.main([*given, "--json", str(path)]) == 0
    assert "--model qwen" in json.loads(path.read_text())["command"]
    edited = tmp_path / "edit.png"
    given = ["edit", str(picture), "make it greyscale", "--model", "qwen", "--preset", "few-4", "--out", str(edited)]
    assert cli.main(given) == 0 and Image.open(edited).size == (128, 128)
    assert "FLOPs" in capsys.readouterr().out


def test_bench_of_the_qwen_editor(tmp_path, monkeypatch):
    from specedit.micro import timing as bench

    asked = []
    monkeypatch.setattr(bench, "presets_against_stock", lambda *a, **k: asked.append((a, k)) or [])
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--model", "qwen", "--size", "128", "--json", str(path)]) == 0
    assert asked == [((128, 3), {"model": "qwen"})]
    written = json.loads(path.read_text())
    assert "specedit bench --model qwen --size 128" in written["command"]
    assert written["of"] == dict(model="qwen", weights=fingerprint(WEIGHTS / "qwen"))


@pytest.mark.parametrize("command", [["demo"], ["eval", "micro"], ["bench"]])
def test_missing_weights_name_the_editor_and_its_trainer(command, monkeypatch, tmp_path, capsys):
    from specedit import micro

    monkeypatch.setitem(micro.load.__globals__, "WEIGHTS", tmp_path)
    assert cli.main([*command, "--model", "qwen"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "python -m training.micro.train --model qwen --out runs/qwen" in error


@pytest.mark.slow
def test_edit_with_the_embedded_editor(shallow_editors, tmp_path, picture, capsys):
    out = tmp_path / "out.png"
    given = ["edit", str(picture), "make it greyscale", "--preset", "few-4", "--out", str(out)]
    assert cli.main([*given, "--figure", str(tmp_path / "figure.png")]) == 0
    assert Image.open(out).size == (128, 128) and (tmp_path / "figure.png").exists()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("editing with the embedded kontext editor") and said[-1] == f"wrote {out}"
    Image.open(picture).resize((150, 100)).save(tmp_path / "other.png")
    given[1] = str(tmp_path / "other.png")
    assert cli.main(given) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}, 144 x 96 px of 150 x 100"


@pytest.mark.slow
def test_guidance_options_are_checked(picture, tmp_path, capsys):
    given = ["edit", str(picture), "make it greyscale", "--out", str(tmp_path / "out.png"), "--preset", "turbo"]
    assert cli.main([*given, "--negative-prompt", "blue"]) == 2
    expected = "--negative-prompt: expected --true-cfg-scale above 1 with it, got 1, the default of FluxKontextPipeline"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)
    for scale, word in ((2.0, {"negative_prompt": "blue", "true_cfg_scale": 2.0}), (None, None)):
        asked = SimpleNamespace(negative_prompt="blue" if word else None, true_cfg_scale=scale)
        assert shared.guidance(micro.load("kontext"), asked) == (word or {})
    asked = SimpleNamespace(negative_prompt=" ", true_cfg_scale=None)
    assert shared.guidance(micro.load("qwen"), asked) == {"negative_prompt": " "}  # its own default is above 1

    class Other:
        def __call__(self, image, prompt, negative_prompt=None, guidance_scale=4.5):
            pass

    assert shared.guidance(Other(), asked) == {"negative_prompt": " "}
    asked.true_cfg_scale = 2.0
    with pytest.raises(shared.CLIError, match="--true-cfg-scale: expected none with Other, got 2"):
        shared.guidance(Other(), asked)


def test_gpu_without_kernels_uses_pytorch(monkeypatch):
    """What cannot be used is found, and said once, before a pipeline is loaded."""
    from specedit_kernels import ops, self_check, verdict

    assert torch.cuda.is_available() or shared.attention_here() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    works = [self_check.Finding("merged", "dense", 0.0, 1.0)]
    breaks = [self_check.Finding("merged", "dense", why="RuntimeError: no flash attention")]
    for error, merged, expected in (
        (None, works, {}),
        (RuntimeError("expected a GPU of 8.0, got 7.5"), works, {"attention": "merged"}),
        (ImportError("expected Triton"), breaks, {"attention": "torch"}),
    ):

        def check(device, error=error):
            if error is not None:
                raise error

        monkeypatch.setattr(ops, "check_gpu", check)
        monkeypatch.setattr(verdict.verdict_file, "identity", lambda device: {})
        monkeypatch.setattr(verdict.verdict_file, "read", lambda of: works)
        monkeypatch.setattr(self_check, "run_checks", lambda device, backends, merged=merged: merged)
        verdict.forget()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert shared.attention_here() == shared.attention_here() == expected
        assert len(said) == (error is not None)
        assert error is None or f"no Triton kernel runs here: {error}" in str(said[0].message)
    verdict.forget()


@pytest.mark.slow
def test_commands_run_with_their_preset_and_this_machines_attention(shallow_editors, monkeypatch, tmp_path, picture):
    import specedit
    from specedit.config import presets, resolve
    from specedit.micro import timing as bench

    taken, install = [], specedit.install

    def recorded(pipe, preset, **settings):
        taken.append((resolve(preset).steps, settings["attention"]))
        return install(pipe, preset, **settings)

    monkeypatch.setattr("specedit.api.installing.install", recorded)
    for command in (cli.edit, cli.evaluate, cli.bench):
        monkeypatch.setattr(command, "attention_here", lambda: {"attention": "torch"})
    given = ["make it greyscale", "--out", str(tmp_path / "out.png"), "--preset", "few-4"]
    assert cli.main(["edit", str(picture), *given]) == 0
    assert cli.main(["eval", "micro", "--cases", "1", "--size", "64", "--preset", "lightning-6"]) == 0
    assert taken == [(presets[name].steps, "torch") for name in ("few-4", "lightning-6")]
    monkeypatch.setattr(bench, "presets_against_stock", lambda *_, **settings: taken.append(settings) or [])
    assert cli.main(["bench", "--size", "64"]) == 0
    assert taken[2] == {"model": "kontext", "attention": "torch"}


@pytest.mark.slow
def test_edit_keeps_pixels_outside_a_mask(shallow_editors, tmp_path, picture):
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    given = ["edit", str(picture), "make it greyscale", "--mask", str(tmp_path / "mask.png"), "--keep-pixels"]
    assert cli.main([*given, "--preset", "few-4", "--out", str(out)]) == 0
    before, after = (np.asarray(Image.open(p)) for p in (picture, out))
    assert np.array_equal(before[32:], after[32:]) and np.array_equal(before[:, 32:], after[:, 32:])
    assert not np.array_equal(before[:32, :32], after[:32, :32])


@pytest.mark.slow
def test_eval_micro(shallow_editors, few_renders, tmp_path, capsys):
    path = tmp_path / "eval.json"
    given = ["eval", "micro", "--preset", "few-4", "--cases", "1", "--textures", "1", "--size", "96"]
    assert cli.main([*given, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [row["kind"] == "texture" for row in written["rows"]] == [False, True]
    assert written["mean"]["texture_distance"] > 0 and "--textures 1" in written["command"]
    assert written["machine"]["torch"] and "--cases 1" in written["command"]
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["tasks", "success", "edit", "dB", "texture"]
    (texture,) = [line for line in lines if line.startswith("texture")]
    assert texture.split()[1:4] == ["1", "-", "-"]


@pytest.mark.slow
def test_bench(shallow_editors, tmp_path, monkeypatch):
    from specedit.micro import timing as bench

    path, installed, install = tmp_path / "bench.json", [], bench.install
    monkeypatch.setattr(bench, "STOCK_STEPS", 4)
    monkeypatch.setattr(bench, "STANDARD_PRESETS", ("few-4", "lightning-6"))
    monkeypatch.setattr(
        bench, "install", lambda *args, **more: installed.append((args[1:], more)) or install(*args, **more)
    )
    assert cli.main(["bench", "--size", "64", "--repeat", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert installed[: len(rows)] == installed[len(rows) :] and installed[0] != installed[1]  # they take turns
    assert [(r["preset"], r["restore"]) for r in rows] == list(product(("few-4", "lightning-6"), STANDARD_RESTORES))
    for row in rows:
        assert row["speedup"] == pytest.approx(row["seconds_stock"] / row["seconds"], rel=1e-3)
        assert sum(stage["seconds"] for stage in row["stages"]) <= row["seconds"]  # of one and the same call
        for key in ("peak_memory_stock", "peak_memory"):
            assert (row[key] > 0) if torch.cuda.is_available() else (row[key] is None)


def test_bench_plan_predicts_without_measuring(tmp_path, capsys):
    path = tmp_path / "plan.json"
    given = ["bench", "plan", "--gpu", "H200", "--preset", "turbo", "--restore", "reference", "--edited", "10"]
    assert cli.main([*given, "--measured", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "predicted for H200" in out and "draft" in out and "mixed" in out and "not measured" in out
    written = json.loads(path.read_text())
    assert written["gpu"] == "H200" and written["stages"][0]["name"] == "encode"
    assert f"{written['clock_ratio']:.2f}x" in out


def test_bench_plan_restores_as_the_preset_does(capsys):
    for more, restore in (([], "reference"), (["--restore", "full"], "full")):
        assert cli.main(["bench", "plan", "--preset", "few-4", *more]) == 0
        assert f"few-4, restore={restore}, " in capsys.readouterr().out


def test_bench_plan_takes_the_switches(tmp_path):
    path, ratios = tmp_path / "plan.json", []
    for more in ([], ["--reference-refresh", "4"], ["--reference-refresh", "4", "--guidance-range", "0.2", "1"]):
        given = ["bench", "plan", "--model", "qwen-image-edit", "--preset", "turbo", "--restore", "reference", *more]
        assert cli.main([*given, "--measured", "--json", str(path)]) == 0
        ratios.append(json.loads(path.read_text())["flops_ratio"])
    assert ratios == sorted(set(ratios))


def test_bench_plan_of_a_strength_has_no_draft(tmp_path, capsys):
    path = tmp_path / "plan.json"
    given = ["bench", "plan", "--measured", "--json", str(path)]
    assert cli.main([*given, "--strength", "0.7"]) == 0
    written = json.loads(path.read_text())
    assert [stage["name"] for stage in written["stages"]] == ["encode", "mixed", "full", "decode"]
    assert (written["nfe"], written["stock_steps"]) == (13, 20)
    assert "Against stock's 20 steps of this strength" in capsys.readouterr().out


def test_bench_plan_shows_measured_and_predicted_seconds(tmp_path, capsys):
    path = tmp_path / "end_to_end-real.json"
    row = dict(
        model="flux-kontext", preset="turbo", restore="full", height=1024, width=1024, batch=1, edit_fraction=0.2,
        seconds=2.5, seconds_stock=20.0, speedup=8.0, flops_ratio=7.0, stages=[dict(name="draft", seconds=0.321)],
    )  # fmt: skip
    path.write_text(json.dumps(dict(machine=dict(gpu="NVIDIA H100 80GB HBM3"), rows=[row])))
    assert cli.main(["bench", "plan", "--preset", "turbo", "--measured", str(path)]) == 0
    out = capsys.readouterr().out
    assert "0.321" in out and "8.00x" in out and "not measured" not in out


def test_a_pipeline_of_another_kind_chooses_its_own_size(tmp_path, picture, monkeypatch):
    heard = {}

    class Other:
        def __call__(self, image, prompt, height=0, width=0, negative_prompt=None, edit_mask=None, generator=None):
            heard.update(locals())
            return SimpleNamespace(images=[image])

        def to(self, device):
            return self

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: Other())
    monkeypatch.setattr("specedit.api.installing.install", lambda pipe, *_, **__: pipe)
    given = ["edit", str(picture), "make it red", "--model", "some/editor", "--negative-prompt", " "]
    assert cli.main([*given, "--out", str(tmp_path / "out.png")]) == 0
    assert heard["negative_prompt"] == " "
    assert (heard["height"], heard["width"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "plan", "--gpu", "H900"], "gpu: expected one of A100, H100, H200, B200, got 'H900'"),
        (["bench", "plan", "--reference-refresh", "0"], "reference_refresh: expected an integer of at least 1"),
        (["bench", "plan", "--guidance-range", "0.9", "0.2"], "guidance_range: expected two sigmas"),
        (["bench", "plan", "--strength", "0"], "--strength: expected a number above 0, at most 1, got 0.0"),
        (["bench", "plan", "--edited", "120"], "--edited: expected percent, from 0 to 100, got 120"),
        (["bench", "plan", "--measured", "nowhere.json"], "nowhere.json"),
        (["edit", "nowhere.png", "make it red"], "nowhere.png"),
        (["demo", "--size", "100"], "--size: expected a multiple of 16 from 128 to 512, got 100"),
        (["eval", "micro", "--size", "100"], "--size: expected a multiple of 16 from 64 to 1024, got 100"),
        (["eval", "micro", "--steps", "0"], "--steps: expected a whole number from 1 to 1,000, got 0"),
        (["eval", "micro", "--preset", "stock", "--restore", "full"], "--restore: expected none with --preset stock"),
        (["eval", "gedit", "--data", ".", "--model", "kontext", "--cases", "0"], "--cases: expected a whole"),
        (
            ["eval", "imgedit", "--data", "nowhere", "--model", "kontext"],
            "--data: expected a folder with the basic_edit",
        ),
        (["bench", "--size", "48"], "--size: expected a multiple of 16 from 64 to 1024, got 48"),
        (["eval", "micro", "--textures", "-1"], "--textures: expected a whole number from 0 to 1,000,000, got -1"),
        (["eval", "micro", "--cases", "0"], "--cases: expected a whole number from 1 to 1,000,000, got 0"),
        (["bench", "--repeat", "0"], "--repeat: expected a whole number from 1 to 1,000, got 0"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, says, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1


def test_startup_errors_are_one_line():
    """Libraries have their say while they are imported, before any of our code could stop them."""
    code = "import sys; from specedit.cli import main; sys.exit(main(['edit', 'nowhere.png', 'x']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.splitlines() == [
        "specedit: image: expected a picture file, got nowhere.png, which does not exist"
    ]


def test_plan_rejects_files_without_results(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    assert cli.main(["bench", "plan", "--measured", str(tmp_path / "other.json")]) == 2
    assert "--measured: expected a result file with machine and rows, got" in capsys.readouterr().err
    plan = tmp_path / "new" / "plan.json"
    assert cli.main(["bench", "plan", "--measured", "--json", str(plan)]) == 0 and plan.exists()


def test_model_directory_without_a_pipeline_is_rejected(tmp_path, picture, capsys):
    assert cli.main(["edit", str(picture), "x", "--model", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_empty_prompts_and_non_pictures_are_rejected(tmp_path, picture, capsys):
    assert cli.main(["edit", str(picture), "  "]) == 2
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    assert cli.main(["edit", str(broken), "make it greyscale", "--out", str(tmp_path / "out.png")]) == 2
    assert all("specedit: " in line for line in capsys.readouterr().err.strip().splitlines())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["demo", "--preset", "warp"], "'warp' (choose from"),
        (["demo", "--seed", "x"], "--seed: expected a whole number from 0 to 2^63 - 1, got x"),
        (["demo", "--seed", "-1"], "got -1"),
        (["edit", "in.png", "x", "--seed", str(2**63)], f"2^63 - 1, got {2**63}"),
        (["eval", "vibes"], "'vibes'"),
        (["edit", "in.png"], "prompt"),
        (["bench", "plan", "--colour", "red"], "--colour"),
        (["eval", "micro", "--data", "x"], "specedit eval micro: unrecognized arguments: --data x"),
        (["eval", "micro", "--seed", "1"], "specedit eval micro: unrecognized arguments: --seed 1"),
        (
            ["eval", "gedit", "--data", "x", "--model", "y", "--size", "64"],
            "eval gedit: unrecognized arguments: --size",
        ),
        (["eval", "imgedit", "--data", "x", "--model", "y", "--language", "en"], "unrecognized arguments: --language"),
        (["eval", "gedit", "--data", "x", "--model", "y", "--language", "fr"], "'fr'"),
        (["eval", "gedit", "--model", "kontext"], "--data"),
        (["eval", "imgedit", "--data", "x"], "--model"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and len(error.splitlines()) == 1


def test_library_startup_messages_are_hidden():
    import diffusers
    import transformers

    before = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    try:
        shared.silence_libraries()
        assert all(library.utils.logging.get_verbosity() == logging.ERROR for library in (diffusers, transformers))
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("dtype", FutureWarning, stacklevel=1)
        assert not caught
    finally:
        for library, level in zip((diffusers, transformers), before, strict=True):
            library.utils.logging.set_verbosity(level)


@pytest.mark.parametrize("out", ["edit.xyz", "edit", "edit.txt"])
@pytest.mark.parametrize("option", ["--out", "--figure"])
def test_unwritable_file_is_rejected_before_any_work(tmp_path, picture, capsys, monkeypatch, option, out):
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("a pipeline was loaded"))
    assert cli.main(["edit", str(picture), "make it greyscale", option, str(tmp_path / out)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"expected a picture file such as edit.png, got {tmp_path / out}" in error and len(error.splitlines()) == 1


def test_demo_into_a_file_is_rejected_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("specedit.micro.demonstration.run", lambda *_, **__: pytest.fail("the demo ran"))
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("size", "got"), [((40, 300), (32, 288)), ((2000, 100), (512, 16)), ((5, 5), (16, 16))])
def test_pictures_that_are_too_small_or_too_long_run_stock(shallow_editors, tmp_path, size, got):
    Image.new("RGB", size).save(tmp_path / "in.png")
    given = ["edit", str(tmp_path / "in.png"), "make it greyscale", "--out", str(tmp_path / "out.png")]
    with pytest.warns(UserWarning, match="runs the stock pipeline: a picture with fewer than 4 tokens a side, 64 px"):
        assert cli.main(given) == 0
    assert Image.open(tmp_path / "out.png").size == got


def test_decompression_bomb_is_rejected(tmp_path, capsys, picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert cli.main(["edit", str(picture), "make it greyscale", "--out", str(tmp_path / "out.png")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_out_of_memory_is_one_line(capsys, monkeypatch, picture, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipelines, "load", fail)
    assert cli.main(["edit", str(picture), "make it greyscale", "--out", str(picture.parent / "out.png")]) == 2
    said = "specedit: out of memory; --offload, --size, a smaller picture or model takes less\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(pipelines, "load", lambda *_, **__: [][0])
    assert cli.main(["edit", str(picture), "make it greyscale", "--out", str(picture.parent / "out.png")]) == 1
    assert capsys.readouterr().err.startswith("specedit: unexpected IndexError: list index out of range; SPECEDIT_TR")

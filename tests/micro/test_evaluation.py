"""Scores of known results, and the packaged editors end to end."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit import micro
from specedit.micro.evaluation import grow, mean, psnr, score
from specedit.micro.loading import WEIGHTS
from training.micro import build_qwen
from training.micro.families import family_named
from training.micro.train_vae import roundtrip


@pytest.fixture(scope="module", params=["kontext", "qwen"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    pipe = micro.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_psnr_of_a_known_difference():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[:2] = 51  # a fifth of the range
    where = np.zeros((4, 4), bool)
    where[:2] = True
    assert psnr(a, b, where) == pytest.approx(-20 * math.log10(0.2))
    assert psnr(a, b, ~where) == 60 and math.isnan(psnr(a, b, where & False))


def test_grow_is_a_square():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert grow(mask, 2).sum() == 25


def test_target_and_source_as_results():
    case = micro.scenes.sample(3, 128)
    perfect, untouched = score(case.target, case), score(case.source, case)
    assert perfect["success"] and perfect["edit_psnr"] == 60
    assert not untouched["success"] and untouched["keep_psnr"] == 60
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    assert not score(noise, case)["success"]


def test_result_of_another_size_is_refused():
    case = micro.scenes.sample(3, 100)
    with pytest.raises(ValueError, match="image: expected 100 x 100 as the case, got 96 x 96; sides are whole tokens"):
        score(Image.new("RGB", (96, 96)), case)


def test_zero_steps_are_rejected(pipe):
    specedit.install(pipe, "turbo")
    try:
        with pytest.raises(ValueError, match="num_inference_steps: expected an integer of at least 1, got 0"):
            micro.evaluate(pipe, [micro.scenes.sample(3, 128)], num_inference_steps=0)
    finally:
        specedit.uninstall(pipe)


def test_mean_skips_nan():
    out = mean([dict(a=1.0, kind="x"), dict(a=math.nan, kind="x"), dict(a=3.0, kind="y")])
    assert out == {"count": 3, "a": 2.0}


def modules(pipe):
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def test_weights_are_small_and_load_offline(pipe, name):
    folder = micro.load.__globals__["WEIGHTS"] / name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 40e6
    assert {part.dtype for part in modules(pipe)} == {torch.float32}
    held = json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert held == {"kontext": "FluxKontextPipeline", "qwen": "QwenImageEditPipeline"}[name]


def test_load_casts_to_dtype(name):
    half = micro.load(name, dtype=torch.bfloat16)
    assert {part.dtype for part in modules(half)} == {torch.bfloat16}


def test_saved_configs_suit_transformers_4_and_5(shallow_editors, name, tmp_path):
    """Saved files use names that both versions read; scripts/compat.sh runs these tests with both."""
    family_named(name).save(micro.load(name), tmp_path)
    for folder in (tmp_path, WEIGHTS / name):

        def read(file, folder=folder):
            return json.loads((folder / file).read_text())

        for file in folder.glob("*/tokenizer_config.json"):
            said, words = json.loads(file.read_text()), json.loads((file.parent / "tokenizer.json").read_text())
            assert not isinstance(said.get("extra_special_tokens"), list)
            assert said["add_prefix_space"] == bool(words["pre_tokenizer"].get("add_prefix_space"))
        if name == "kontext":
            landmarks = read("tokenizer_2/tokenizer_config.json")["additional_special_tokens"]
            assert landmarks == [f"<landmark{i}>" for i in range(12)]
        else:
            encoder, look = read("text_encoder/config.json"), read("processor/preprocessor_config.json")
            text = encoder["text_config"]
            assert "rope_parameters" not in text and text["rope_theta"] == 1e6
            assert text["rope_scaling"]["mrope_section"] == [6, 9, 9]
            assert encoder["vision_start_token_id"] == -1
            assert (look["min_pixels"], look["max_pixels"]) == (784, 3136)


def test_unknown_editor():
    with pytest.raises(ValueError, match='expected "kontext" or "qwen", got \'flux\''):
        micro.load("flux")


def test_missing_weights_name_the_training_command(monkeypatch, tmp_path):
    (tmp_path / "kontext").mkdir()
    (tmp_path / "kontext" / "model_index.json").write_text("{}")
    monkeypatch.setitem(micro.load.__globals__, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights of the editor 'qwen': expected .*; it holds kontext$"):
        micro.load("qwen")
    with pytest.raises(FileNotFoundError, match=r"`python -m training.micro.train --model qwen --out runs/qwen`"):
        micro.load("qwen")
    monkeypatch.setitem(micro.load.__globals__, "WEIGHTS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"'kontext': expected .*; it holds none"):
        micro.load("kontext")


@pytest.mark.slow
def test_autoencoder_round_trip_is_at_least_30_db(pipe, name):
    assert roundtrip(family_named(name).flat(pipe.vae), "cpu", 512, 1) >= 30


@pytest.mark.slow
def test_stock_and_installed_are_scored(shallow_editors, name):
    pipe = micro.load(name)
    pipe.set_progress_bar_config(disable=True)
    cases = [micro.scenes.sample(seed, {"kontext": 128, "qwen": (64, 96)}[name]) for seed in (0, 1)]
    stock = micro.evaluate(pipe, cases, num_inference_steps=4)
    assert len(stock["cases"]) == 2 and stock["mean"]["count"] == 2
    specedit.install(pipe, "turbo", restore="reference")
    try:
        fast = micro.evaluate(pipe, cases)
        assert specedit.report(pipe).nfe == 9
    finally:
        specedit.uninstall(pipe)
    for row in (*stock["cases"], *fast["cases"]):
        assert row["flops"] > 0 and row["seconds"] > 0 and isinstance(row["success"], bool)
    assert 0 <= fast["mean"]["edit_fraction"] <= 1
    again = micro.evaluate(pipe, cases, num_inference_steps=4)
    assert [r["edit_psnr"] for r in again["cases"]] == [r["edit_psnr"] for r in stock["cases"]]


@pytest.mark.thorough
def test_specedit_solves_what_stock_solves(pipe):
    """Removing and adding an object, in tasks that the stock pipeline solves in ten steps."""
    cases = [micro.scenes.sample(seed, 128) for seed in (2, 1)]
    assert [case.kind for case in cases] == ["remove", "add"]
    stock = micro.evaluate(pipe, cases, num_inference_steps=10)["cases"]
    assert all(row["success"] for row in stock)
    for restore in ("full", "reference"):
        specedit.install(pipe, "turbo", restore=restore)
        try:
            fast = micro.evaluate(pipe, cases)["cases"]
        finally:
            specedit.uninstall(pipe)
        for ours, theirs in zip(fast, stock, strict=True):
            assert ours["success"] and ours["edit_psnr"] > theirs["edit_psnr"] - 6
            assert ours["flops"] < theirs["flops"] / 1.2


@pytest.mark.thorough
def test_reference_restore_preserves_unedited_pixels(pipe, name):
    kept = {"full": [], "reference": []}
    for case in (micro.scenes.sample(seed, 128) for seed in (0, 1, 11)):  # one of each: shape, add, recolor
        call = dict(image=case.source, prompt=case.prompt, edit_mask=case.mask, **micro.arguments(case.source, name))
        for restore, scores in kept.items():
            specedit.install(pipe, "few-4", restore=restore)
            image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
            scores.append(score(image, case)["keep_psnr"])
    specedit.uninstall(pipe)
    assert all(ours > theirs for ours, theirs in zip(kept["reference"], kept["full"], strict=True))


@pytest.mark.slow
def test_qwen_is_evaluated_with_guidance(small_qwen, monkeypatch, tmp_path):
    build_qwen.save(small_qwen, tmp_path / "qwen")
    monkeypatch.setitem(micro.load.__globals__, "WEIGHTS", tmp_path)
    pipe = micro.load("qwen")
    pipe.set_progress_bar_config(disable=True)
    cases, scales = [micro.scenes.sample(0, 64)], []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: scales.append(1) or forward(*a, **k))
    stock = micro.evaluate(pipe, cases, num_inference_steps=2)
    assert len(scales) == 4  # two steps under two prompts
    specedit.install(pipe, steps=(2, 1, 1), draft_steps=2)
    fast = micro.evaluate(pipe, cases)
    for row in (*stock["cases"], *fast["cases"]):
        assert row["flops"] > 0 and math.isfinite(row["keep_psnr"])
    # What the report calls stock, 50 steps, is what scoring a stock run counts.
    counted = fast["cases"][0]["flops"] * fast["cases"][0]["flops_ratio"]
    assert counted == pytest.approx(25 * stock["cases"][0]["flops"], rel=1e-6)

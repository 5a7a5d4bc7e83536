"""Textures in the evaluation of the embedded editors."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from specedit import micro
from specedit.micro import scenes
from specedit.micro.evaluation import TEXTURE_SEED, score
from specedit.micro.judging import Judge, autoencoding, judge_of


@pytest.fixture(scope="module")
def judge():
    return Judge()


def task(where, size=128):
    """The first texture of the tables that fills the background, or an object."""
    return next(case for case in micro.texture_cases(8, size) if ("background" in case.prompt) == (where == "ground"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ground", "object"])
def test_a_right_answer_and_the_source_as_results(judge, where):
    case = task(where)
    right, source = score(case.target, case, judge), score(case.source, case, judge)
    assert right["material"] is True
    assert where == "ground" or right["keep_psnr"] == source["keep_psnr"] == 60  # objects are small here
    assert right["texture_distance"] < 1.8 and right["seam"] < 2.5
    assert source["texture_distance"] > 1.5 * right["texture_distance"]
    parts = [value for name, value in right.items() if name.startswith("texture_") and name != "texture_distance"]
    assert right["texture_distance"] == pytest.approx(sum(parts) / len(parts)) and len(parts) >= 5
    assert not {"success", "edit_psnr"} & set(right)
    assert score(case.target, case, judge) == right


@pytest.mark.slow
def test_another_right_answer_is_right_too(judge):
    case = task("ground")
    other = score(scenes.fresh(case, 5).target, case, judge)
    assert other["material"] is True and other["texture_distance"] < 1.8


def test_a_region_too_small_for_statistics_counts_nowhere(judge):
    case = next(c for c in micro.texture_cases(30, 48) if "background" not in c.prompt and c.region.sum() < 30)
    row = score(case.target, case, judge)
    assert all(math.isnan(row[name]) for name in ("texture_distance", "material", "seam"))


def test_only_textures_are_judged(judge):
    case = scenes.sample(0, 128)
    with pytest.raises(ValueError, match=f"case: expected the kind texture, got {case.kind}"):
        judge.score(case.target, case)
    case = task("ground")
    with pytest.raises(ValueError, match=r"region: expected the picture's 64 x 64 px, got \(128, 128\)"):
        judge.score(case.target.resize((64, 64)), case)


def test_tables_draw_their_own_textures():
    first, second = micro.texture_cases(2, 64), micro.texture_cases(2, 64, first=1)
    assert [case.seed for case in first] == [TEXTURE_SEED, TEXTURE_SEED + 1] and second[0].seed == first[1].seed
    assert all(case.kind == "texture" and case.material for case in first)
    assert TEXTURE_SEED < scenes.TRAINING_SEED


def test_means_of_mixed_tasks_are_over_those_that_have_the_number():
    rows = [
        dict(seed=0, kind="add", success=True, edit_psnr=20.0, keep_psnr=30.0),
        dict(seed=1, kind="texture", texture_distance=1.5, material=True, keep_psnr=40.0),
        dict(seed=2, kind="texture", texture_distance=math.nan, material=math.nan, keep_psnr=math.nan),
    ]
    done = micro.summary(rows)
    assert done["mean"] == dict(count=3, success=1, edit_psnr=20, keep_psnr=35, texture_distance=1.5, material=1)
    assert done["kinds"]["texture"]["count"] == 2 and "success" not in done["kinds"]["texture"]


@pytest.mark.slow
def test_an_editor_is_compared_through_its_own_autoencoder(pipe, small_qwen):
    assert judge_of(pipe) is judge_of(pipe) and judge_of(pipe) is not judge_of(small_qwen)
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    for vae in (pipe.vae, small_qwen.vae):
        through = autoencoding(vae)
        once = through(pictures)
        assert once.shape == pictures.shape and once.min() >= 0 and once.max() <= 1 and not once.requires_grad
        assert torch.allclose(through(pictures[:1]), once[:1], atol=1e-5)
    assert isinstance(small_qwen.vae, AutoencoderKLQwenImage)
    seen = []
    counted = Judge(lambda part: seen.append(len(part)) or part)
    case = task("object")
    counted.score(case.target, case)
    first = sum(seen)
    assert first > 0
    counted.score(case.source, case)
    assert sum(seen) == first  # what was drawn is kept


@pytest.mark.slow
def test_evaluate_scores_both_kinds_of_tasks(monkeypatch):
    """A perfect editor: the fresh renders go through its autoencoder, which changes nothing here."""
    pipe = micro.load("kontext")
    answers = {}

    def edit(image, prompt, **call):
        return type("Output", (), dict(images=[answers[prompt]]))

    monkeypatch.setattr(type(pipe), "__call__", lambda self, image, prompt, **call: edit(image, prompt))
    monkeypatch.setattr("specedit.micro.judging.autoencoding", lambda vae: None)
    cases = [scenes.sample(3, 128), task("ground")]
    answers.update({case.prompt: case.target for case in cases})
    done = micro.evaluate(pipe, cases, num_inference_steps=1)
    exact, texture = done["cases"]
    assert exact["success"] and "texture_distance" not in exact
    assert texture["texture_distance"] < 1.8 and texture["material"] and texture["flops"] > 0
    assert done["mean"]["success"] == 1 and done["mean"]["texture_distance"] == texture["texture_distance"]
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    answers[cases[1].prompt] = Image.fromarray(noise)
    assert micro.evaluate(pipe, cases[1:], num_inference_steps=1)["mean"]["texture_distance"] > 3

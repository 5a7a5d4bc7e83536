"""Strengths below 1: the run starts where the stock pipeline does, from the noised picture."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import specedit
from specedit.config import resolve
from specedit.method.schedule import contracted_sigma
from tests.models.planned import presets_and_restores

from .conftest import EVERYTHING, mask_of, token_mask

STRETCHED = dict(use_dynamic_shifting=True, shift_terminal=0.02)


def stock_run(inpaint, pipe, **call):
    """What the stock call returns, and the sigmas that it has gone through."""
    latents, scheduler = inpaint(pipe, **call), pipe.scheduler
    return latents, scheduler.sigmas[scheduler.begin_index :]


@pytest.mark.parametrize("strength", [0.95, 0.6, 0.3, 0.05])
def test_full_resolution_throughout_is_the_stock_call(inpaint, pipe, strength):
    if inpaint.name == "qwen":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**STRETCHED)  # as the released one
    call = dict(mask_image=EVERYTHING, strength=strength, num_inference_steps=5)
    stock, sigmas = stock_run(inpaint, pipe, **call)
    specedit.install(pipe, steps=(0, 0, 5))
    torch.testing.assert_close(inpaint(pipe, **call), stock, rtol=1e-3, atol=1e-3)
    report = specedit.report(pipe)
    (stage,) = (stage for stage in report.stages if stage.steps)
    assert report.nfe == stage.steps == report.stock_steps == len(sigmas) - 1
    assert stage.sigma_start == pytest.approx(float(sigmas[0]), abs=1e-6)


@pytest.mark.slow
def test_everything_expanded_is_the_stock_call(inpaint, pipe):
    for guide in ({}, inpaint.guided):
        call = dict(mask_image=EVERYTHING, strength=0.6, num_inference_steps=5) | guide
        with specedit.disabled(pipe):
            stock = inpaint(pipe, **call)
        specedit.install(pipe, steps=(0, 5, 0), restore="reference")
        torch.testing.assert_close(inpaint(pipe, **call), stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.9, 0.6, 0.3, 0.1])
def test_stages_start_where_stock_starts(inpaint, pipe, strength):
    """In coarse tokens at the level of as much noise, or in the first stage that ends below the start."""
    call = dict(strength=strength, num_inference_steps=10)
    _, sigmas = stock_run(inpaint, pipe, **call)
    specedit.install(pipe, boundaries=(0.7, 0.4))
    inpaint(pipe, **call)
    report = specedit.report(pipe)
    first, *others = (stage for stage in report.stages if stage.steps)
    start = float(sigmas[0])
    skipped = max((start <= 1.4 / 1.7) + (start <= 0.8 / 1.4), report.config.steps.count(0))
    expected = ["coarse", "mixed", "full"][skipped:]
    assert [first.name, *(stage.name for stage in others)] == expected
    coarse = contracted_sigma(start) if first.name == "coarse" else start
    assert first.sigma_start == pytest.approx(coarse, abs=1e-6)
    assert report.nfe == report.stock_steps == len(sigmas) - 1 == sum(stage.steps for stage in (first, *others))


@pytest.mark.slow
def test_the_default_strength_is_accelerated(inpaint, pipe):
    """Without num_inference_steps, too: from the sigma of the stock call's own steps, with the preset's steps cut."""
    arguments = {name: value for name, value in inpaint.arguments.items() if name not in ("strength",)}
    inpaint.arguments = arguments | dict(num_inference_steps=50)
    _, sigmas = stock_run(inpaint, pipe)
    del inpaint.arguments["num_inference_steps"]
    specedit.install(pipe, "turbo", uniform_stride=0)
    inpaint(pipe)
    report = specedit.report(pipe)
    if inpaint.name == "kontext":  # at strength 1 unless it is told otherwise
        assert report.nfe == 9 and report.stock_steps == 28
        return
    assert report.stock_steps == len(sigmas) - 1 == {"qwen": 30, "klein": 40}[inpaint.name]
    assert report.nfe == {"qwen": 6, "klein": 8}[inpaint.name]
    first = next(stage for stage in report.stages if stage.steps)
    start = float(sigmas[0])
    assert first.sigma_start == pytest.approx(contracted_sigma(start) if first.name == "coarse" else start, abs=1e-6)


def test_the_same_seed_starts_from_the_same_noise_as_stock(inpaint, pipe, monkeypatch):
    """One step to sigma 0 with a velocity of zero shows the start: stock's latents, coarse where cells are locked."""
    call = dict(strength=0.6, num_inference_steps=5, mask_image=EVERYTHING)
    begun = []
    forward = pipe.transformer.forward

    def keep(*args, **kwargs):
        begun.append(kwargs["hidden_states"][:, :72].clone())
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", keep)
    inpaint(pipe, **call)
    stock = begun[0]
    begun.clear()
    specedit.install(pipe, steps=(0, 0, 5))
    inpaint(pipe, **call)
    torch.testing.assert_close(begun[0], stock, rtol=1e-5, atol=1e-5)
    begun.clear()
    specedit.install(pipe, steps=(0, 5, 0), restore="reference", uniform_stride=0)
    inpaint(pipe, **call | dict(mask_image=mask_of()))
    covered = token_mask(mask_of((slice(0, 64), slice(96, 192))))  # whole cells
    count = int(covered.sum())
    locked = (72 - count) // 4
    torch.testing.assert_close(begun[0][:, locked : locked + count], stock[:, covered], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inpaint", "strength", "first", "turn"),
    [("kontext", 0.9, "full", 0), ("qwen", 0.5, "reference", 1), ("klein", 0.7, "full", 2)],
    indirect=["inpaint"],
)
def test_every_preset_and_restore_runs_as_planned(pipe, assert_planned, strength, first, turn):
    settings = [(preset, dict(restore=restore)) for preset, restore in presets_and_restores(first, turn)]
    for preset, more in [*settings, ("balanced", dict(restore="pixels")), ("ultra", {}), ("few-4", {})]:
        specedit.install(pipe, preset, **more)
        report = assert_planned(resolve(preset, **more), strength=strength, num_inference_steps=12)
        assert report.nfe == report.stock_steps and "draft" not in {stage.name for stage in report.stages}


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        (dict(restore="reference"), 1.0), (dict(boundaries=(0.5, 0.3)), 0.7),
        (dict(guidance_range=(0.4, 0.8)), 0.7), (dict(forecast="reuse", forecast_interval=2), 0.7),
        (dict(draft_steps=0, restore="reference"), 0.7),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_counts_what_the_report_counts(inpaint, pipe, assert_planned, config, strength):
    specedit.install(pipe, **config)
    assert_planned(resolve(**config), strength=strength, num_inference_steps=9, **inpaint.guided)


@pytest.mark.parametrize("locked", ["coarse", "reference", "cached"])
def test_locked_cells_begin_with_the_picture(inpaint, pipe, locked):
    specedit.install(pipe, steps=(1, 2, 1), locked=locked, restore="reference", uniform_stride=0)
    ours = inpaint(pipe, strength=0.6)
    assert ours.isfinite().all() and torch.equal(inpaint(pipe, strength=0.6), ours)
    assert not torch.equal(inpaint(pipe, strength=0.6, seed=4), ours)


def test_modulation_is_kept_of_the_steps_that_are_left(inpaint, pipe):
    specedit.install(pipe, steps=(2, 2, 6), modulation="once")
    kept = []
    for strength in (1.0, 0.5):
        inpaint(pipe, strength=strength)
        kept.append(specedit.report(pipe).modulation["bytes"])
    assert kept[1] <= 0.7 * kept[0]


def test_too_few_steps_for_pixels_are_refused(inpaint, pipe):
    specedit.install(pipe, restore="pixels")
    with pytest.raises(ValueError, match=r"strength: expected one that leaves at least 2 steps .* got 0.1"):
        inpaint(pipe, strength=0.1, num_inference_steps=10)

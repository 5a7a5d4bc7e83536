"""restore="pixels": locked cells are upsampled as a picture, and one full step follows."""

import numpy as np
import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.method import pixels, sampler
from specedit.method.schedule import stages
from specedit.models.flux import FluxKontext
from tests.sampler.common import CENTRE, CORNER, assert_two_single_runs, close, count_calls

QUICK = dict(restore="pixels", steps=(2, 2, 2), draft_steps=2, threshold=1.6, dilation=0)


@pytest.fixture
def upsampled(monkeypatch):
    """(run, groups before, the group after) of every upsampling."""
    seen, upsample = [], sampler.upsample_locked

    def keep(run, groups):
        after = upsample(run, groups)
        seen.append((run, groups, after[0]))
        return after

    monkeypatch.setattr(sampler, "upsample_locked", keep)
    return seen


def test_stages_end_clean_and_start_again_at_the_named_sigma():
    plan = [(s.name, round(s.start, 4), s.end, s.steps) for s in stages(SpecEditConfig(**QUICK))]
    assert plan == [("coarse", 1.0, 0.8, 2), ("mixed", 0.8889, 0.0, 3), ("full", 0.12, 0.0, 1)]
    plan = [(s.name, s.start, s.end, s.steps) for s in stages(SpecEditConfig(restore="pixels", steps=(4, 0, 1)))]
    assert plan == [("coarse", 1.0, 0.0, 4), ("full", 0.12, 0.0, 1)]  # MrFlow itself
    other = SpecEditConfig(restore="pixels", pixel_restore_sigma=0.3)
    assert stages(other)[-1].start == 0.3 and SpecEditConfig(**QUICK).nfe == 6


@pytest.mark.parametrize("size", [(128, 128), (144, 112), (80, 176)])
def test_an_edit_is_finite_and_repeatable(pipe, edit, upsampled, size):
    specedit.install(pipe, **QUICK)
    calls = count_calls(pipe)
    first, again = edit(pipe, size=size), edit(pipe, size=size)
    report = specedit.report(pipe)
    assert torch.isfinite(first).all() and torch.equal(first, again) and sum(calls.values()) == 2 * 8
    assert report.nfe == 6 and [stage.name for stage in report.stages][-3:] == ["pixels", "full", "decode"]
    run, groups, after = upsampled[0]
    assert after.layout.is_fine and after.tokens.shape == first.shape and run.config.restore == "pixels"


def test_fine_tokens_stay_and_locked_ones_come_from_the_picture(pipe, edit, upsampled):
    specedit.install(pipe, **QUICK)
    edit(pipe, edit_mask=CORNER)
    ((run, (group,), after),) = upsampled
    fine = group.layout.fine_tokens
    before = group.layout.full_grid(group.tokens)
    assert torch.equal(after.tokens[:, fine], before[:, fine]) and 0 < len(fine) < 64
    locked = torch.ones(64, dtype=torch.bool)
    locked[fine] = False
    with torch.no_grad():
        expected = pixels.through_pixels(run, before)
    assert torch.equal(after.tokens[:, locked], expected[:, locked])
    assert (expected - before)[:, locked].abs().max() > 1e-3


def test_the_picture_is_decoded_small_and_upsampled(pipe, edit, upsampled, monkeypatch):
    """An autoencoder that copies: then each locked token is a smooth upsampling of the coarse picture."""
    decoded = []

    def decode(self, pipe, state, tokens, kind):
        decoded.append(tuple(state.grid.shape))
        image = state.grid.geometry.to_image(tokens, state.grid.shape)[:, :3].sigmoid()
        return image.repeat_interleave(8, 2).repeat_interleave(8, 3)

    def encode(self, pipe, pictures, grid):
        assert pictures.min() >= 0 and pictures.max() <= 1
        latents = torch.nn.functional.avg_pool2d(pictures, 8).clamp(1e-6, 1 - 1e-6).logit()
        return grid.geometry.from_image(torch.cat([latents, latents[:, :1]], 1))

    specedit.install(pipe, **QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(FluxKontext, "decode", decode)
        patched.setattr(FluxKontext, "encode", encode)
        edit(pipe, edit_mask=CORNER)
    ((run, _, after),) = upsampled
    assert decoded[0] == (4, 4) and after.tokens.shape[1] == 64
    flat = torch.zeros(1, 64, 16)
    flat += torch.tensor([0.3, -0.2, 0.1, 0.3]).repeat_interleave(4)
    with monkeypatch.context() as patched:  # a flat picture stays flat
        patched.setattr(FluxKontext, "decode", decode)
        patched.setattr(FluxKontext, "encode", encode)
        close(pixels.through_pixels(run, flat), flat)


@pytest.mark.slow
def test_the_last_step_starts_from_white_noise_at_the_sigma(pipe, edit, upsampled, monkeypatch):
    started, start = [], sampler.start_stage

    def keep(run, groups, stage, cells):
        made = start(run, groups, stage, cells)
        started.append((stage.name, made))
        return made

    monkeypatch.setattr(sampler, "start_stage", keep)
    # Without Euler steps, tokens stay what they start from: x = (1 - s) x0 + s n.
    monkeypatch.setattr(sampler, "euler_step", lambda *args, **kwargs: None)
    specedit.install(pipe, **QUICK, pixel_restore_sigma=0.25)
    edit(pipe, edit_mask=CORNER, num_images_per_prompt=40)
    (name, (group,)), clean = started[-1], upsampled[-1][2].tokens
    assert name == "full" and group.sigmas == [0.25, 0.0]
    noise = (group.tokens - 0.75 * clean) / 0.25
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.02


def test_everything_edited_takes_no_detour(pipe, edit, upsampled, monkeypatch):
    """Without a locked cell nothing is decoded, and the run is a full one with a small step at its end."""
    specedit.install(pipe, **QUICK)
    monkeypatch.setattr(pixels, "through_pixels", lambda *_: pytest.fail("decoded"))
    edit(pipe, edit_mask=np.ones((128, 128)))
    ((_, (group,), after),) = upsampled
    assert torch.equal(after.tokens, group.tokens)


def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture):
    specedit.install(pipe, **QUICK)
    assert_two_single_runs(pipe, edit, picture, [CORNER, CENTRE])


def test_unedited_pixels_are_kept_beside_it(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = np.asarray(edit(pipe, edit_mask=CORNER, output_type="pil")[0])
    assert np.array_equal(image[64:], np.asarray(picture())[64:])


def test_an_interrupt_before_the_pixels_returns_the_latents_as_they_are(pipe, edit, upsampled):
    specedit.install(pipe, **QUICK)

    def stop(pipe, index, *_):
        pipe._interrupt = index == 3
        return {}

    assert torch.isfinite(edit(pipe, edit_mask=CORNER, callback_on_step_end=stop)).all()
    assert not upsampled and specedit.report(pipe).nfe == 4


def test_an_encoding_of_the_wrong_shape_is_named(pipe, edit, monkeypatch):
    monkeypatch.setattr(FluxKontext, "encode", lambda self, pipe, pictures, grid: torch.zeros(1, 3, 16))
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match=r"encode: expected tokens of shape \(1, 64, 16\), got \(1, 3, 16\)"):
        edit(pipe, edit_mask=CORNER)


def test_fewer_steps_keep_one_before_the_full_one(pipe, edit):
    config = SpecEditConfig(restore="pixels")
    assert config.with_steps(2).steps == (0, 1, 1)
    with pytest.raises(ValueError, match="num_inference_steps: expected at least 2 with restore='pixels', got 1"):
        config.with_steps(1)
    specedit.install(pipe, config)
    edit(pipe, num_inference_steps=2)
    assert specedit.report(pipe).nfe == 2


@pytest.mark.parametrize("n", [2, 3, 9])
def test_other_numbers_of_steps_add_no_mixed_stage(n):
    config = SpecEditConfig(restore="pixels", steps=(4, 0, 1)).with_steps(n)
    assert config.steps == (n - 1, 0, 1) and not config.is_mixed and not config.uses_draft

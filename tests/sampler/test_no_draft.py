"""draft_steps=0: the coarse stage verifies itself."""

import numpy as np
import pytest
import torch

import specedit
import specedit.api.call
from specedit import SpecEditConfig
from specedit.method import selectors
from tests.sampler.common import CORNER, count_calls

QUICK = dict(steps=(2, 2, 2), draft_steps=0, threshold=1.6, dilation=0)
REFERENCE, PIXELS = dict(restore="reference"), dict(keep_pixels=True)
SETTINGS = [dict(), REFERENCE, PIXELS, dict(selector="variance"), dict(verify_at="full")]


@pytest.mark.filterwarnings("ignore:threshold")
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_the_coarse_stage_is_the_verification(pipe, edit, changes):
    specedit.install(pipe, **QUICK | changes)
    calls = count_calls(pipe)
    first, again = edit(pipe), edit(pipe)
    report = specedit.report(pipe)
    assert torch.isfinite(first).all() and torch.equal(first, again)
    names = [stage.name for stage in report.stages]
    assert names[:3] == ["encode", "coarse", "verify"] and "draft" not in names and "second look" not in names
    assert report.draft_steps == 0 and report.nfe == 6 and sum(calls.values()) == 12
    assert report.score.shape == (1, 8, 8) and 0 < report.edit_fraction < 1
    assert report.edit_mask is not None and (report.expand_mask >= report.edit_mask).all()


def test_a_mask_needs_no_verification(pipe, edit):
    specedit.install(pipe, **QUICK, restore="reference")
    masked = edit(pipe, edit_mask=CORNER)
    assert specedit.report(pipe).score is None
    specedit.install(pipe, **QUICK | dict(draft_steps=8), restore="reference")
    assert torch.equal(edit(pipe, edit_mask=CORNER), masked)


def test_cells_are_what_a_draft_of_the_same_answer_gives(pipe, edit, monkeypatch):
    """What is found decides, not when: neither draft nor coarse stage reads it before the mixed stage."""
    cells = torch.zeros(1, 4, 4, dtype=torch.bool)
    cells[:, 1, 2] = True
    monkeypatch.setattr(selectors, "select", lambda run, *_: (torch.zeros(1, 8, 8), cells))
    runs = []
    for steps in (0, 2):
        specedit.install(pipe, **QUICK | dict(draft_steps=steps), uniform_stride=0)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        # A draft draws noise of its own, so the generator is made to stand at one place behind it.
        generator = torch.Generator().manual_seed(2)
        if steps == 0:
            torch.randn(1, 4, 16, generator=generator)
        runs.append(edit(pipe, latents=pipe._pack_latents(noise, 1, 4, 16, 16), generator=generator))
        assert torch.equal(specedit.report(pipe).edit_mask, cells)
    torch.testing.assert_close(*runs)


def test_a_stage_that_shows_no_change_is_not_believed(pipe, edit):
    for restore, share in (("reference", 1), ("full", 0)):
        specedit.install(pipe, **QUICK | dict(threshold=4.0), restore=restore)
        edit(pipe, num_images_per_prompt=2)
        report = specedit.report(pipe)
        assert report.edit_fraction == share and report.empty_drafts == 2
        assert "; 2 of 2 coarse stages showed no change" in str(report)


def test_an_overflow_edits_the_whole_sample(pipe, edit, hooked):
    specedit.install(pipe, **QUICK)

    def spoil(module, args, output):
        output = output.clone()
        output[0] = torch.inf
        return output

    hooked(pipe.vae.decoder.conv_in, spoil)
    with pytest.warns(UserWarning, match="the verification score is not finite"):
        edit(pipe, num_images_per_prompt=2)
    report = specedit.report(pipe)
    assert report.overflowed == 1 and report.edit_mask[0].all() and not report.edit_mask[1].all()


def test_keep_pixels_keeps_what_the_coarse_stage_left(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = np.asarray(edit(pipe, output_type="pil")[0])
    kept = (~specedit.report(pipe).edit_mask[0]).repeat_interleave(32, 0).repeat_interleave(32, 1).numpy()
    assert kept.any() and np.array_equal(image[kept], np.asarray(picture())[kept])


def test_an_interrupted_coarse_stage_has_verified_nothing(pipe, edit):
    specedit.install(pipe, **QUICK, restore="reference")

    def stop(pipe, *_):
        pipe._interrupt = True
        return {}

    assert torch.isfinite(edit(pipe, callback_on_step_end=stop)).all()
    report = specedit.report(pipe)
    assert report.nfe == 1 and report.score is None and report.edit_mask is None and report.edit_fraction == 1


def test_a_decoder_without_features_is_refused_before_any_work(pipe, edit, monkeypatch):
    def refuse(vae):
        raise ValueError("vae: expected a decoder with conv_in")

    monkeypatch.setattr(specedit.api.call, "check_decoder", refuse)
    specedit.install(pipe, **QUICK)
    calls = count_calls(pipe)
    with pytest.raises(ValueError, match="vae: expected a decoder"):
        edit(pipe)
    assert not calls
    edit(pipe, edit_mask=CORNER)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {3: (1, 1, 1), 2: (1, 0, 1), 1: (0, 0, 1)}),  # a single full step finds nothing, and needs nothing
        (dict(restore="reference"), {3: (1, 1, 1), 2: (1, 0, 1), 1: (1, 0, 1)}),
        (dict(keep_pixels=True), {2: (1, 0, 1), 1: (1, 0, 1)}),
        (dict(steps=(2, 2, 0)), {2: (1, 1, 0), 1: (1, 1, 0)}),
    ],
)
def test_fewer_steps_keep_the_coarse_one_that_finds_the_edit(fields, expected):
    config = SpecEditConfig(draft_steps=0, **fields)
    for n, steps in expected.items():
        assert config.with_steps(n).steps == steps and config.with_steps(n).draft_steps == 0


def test_a_call_of_one_step_takes_two_and_says_so(pipe, edit):
    specedit.install(pipe, "ultra")
    with pytest.warns(UserWarning, match="num_inference_steps=1 leaves no step to find .* SpecEdit takes 2") as given:
        edit(pipe, num_inference_steps=1)
        edit(pipe, num_inference_steps=1)
        edit(pipe, num_inference_steps=2)
    assert len(given) == 1
    report = specedit.report(pipe)
    assert report.nfe == 2 and [stage.name for stage in report.stages if stage.steps] == ["coarse", "mixed"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_a_mask_no_number_of_steps_is_too_few(pipe, edit, n):
    specedit.install(pipe, "ultra")
    edit(pipe, num_inference_steps=n, edit_mask=CORNER)
    report = specedit.report(pipe)
    assert report.nfe == n and report.draft_steps == 0 and 0 < report.expand_fraction < 1


def test_configurations_that_find_nothing_need_no_coarse_stage():
    assert not SpecEditConfig(draft_steps=0, selector="uniform", steps=(0, 3, 3)).verifies_coarse
    assert not SpecEditConfig(draft_steps=0, steps=(0, 0, 4)).verifies_coarse
    config = SpecEditConfig(draft_steps=0)
    assert config.finds_cells and not config.uses_draft and config.verifies_coarse
    assert SpecEditConfig(draft_steps=0, steps=(4, 0, 0), keep_pixels=True).verifies_coarse

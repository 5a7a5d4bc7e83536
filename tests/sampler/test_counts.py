"""Evaluations, tokens and operations of a run."""

import pytest

import specedit
from specedit import SpecEditConfig, presets
from tests.sampler.common import CORNER, QUICK, count_calls


@pytest.mark.parametrize("preset", presets)
def test_transformer_calls_are_nfe_plus_draft(pipe, edit, preset):
    config = presets[preset]
    specedit.install(pipe, preset)
    calls = count_calls(pipe)
    edit(pipe)
    assert sum(calls.values()) == config.nfe + config.draft_steps
    report = specedit.report(pipe)
    assert (report.nfe, report.draft_steps) == (config.nfe, config.draft_steps)
    assert sum(stage.steps for stage in report.stages) == config.nfe + config.draft_steps


def test_every_stage_has_its_tokens(pipe, edit):
    specedit.install(pipe, steps=(2, 3, 4), draft_steps=5, uniform_stride=0)
    calls = count_calls(pipe)
    edit(pipe)
    assert calls[2 * 4] == 5 and calls[2 * 16] >= 2 and calls[2 * 64] >= 4
    report = specedit.report(pipe)
    assert [s.name for s in report.stages] == ["encode", "draft", "verify", "coarse", "mixed", "full", "decode"]
    stages = {stage.name: stage for stage in report.stages}
    assert (stages["draft"].tokens, stages["coarse"].tokens, stages["full"].tokens) == (24, 48, 144)  # with the text
    calls.clear()
    edit(pipe, edit_mask=CORNER)  # four of the sixteen cells; no draft
    assert calls == {2 * 16: 2, 2 * (12 + 16): 3, 2 * 64: 4}
    report = specedit.report(pipe)
    assert report.draft_steps == 0 and report.edit_fraction == report.expand_fraction == 0.25


@pytest.mark.parametrize(
    ("changes", "expand"),
    [({"steps": (0, 0, 2)}, 1), ({"steps": (1, 0, 2)}, 1), ({"steps": (2, 2, 2), "selector": "uniform"}, 0.25)],
)
def test_without_a_mask_everything_may_have_been_edited(pipe, edit, changes, expand):
    specedit.install(pipe, **changes)
    edit(pipe)
    report = specedit.report(pipe)
    assert report.edit_mask is None and report.edit_fraction == 1 and report.expand_fraction == expand


def test_a_boundary_that_is_met_again_leaves_no_empty_stage(pipe, edit):
    """0.55 as float32 lies above 0.55."""
    for boundary in (0.55, 0.7):
        specedit.install(pipe, steps=(4, 4, 4), boundaries=(boundary, boundary), uniform_stride=0, threshold=4)
        edit(pipe)
        mixed = next(stage for stage in specedit.report(pipe).stages if stage.name == "mixed")
        assert mixed.sigma_start > boundary + 0.1 and mixed.sigma_end == pytest.approx(boundary)
        specedit.uninstall(pipe)


def test_reference_restore_never_runs_at_full_resolution(pipe, edit):
    specedit.install(pipe, steps=(2, 3, 4), restore="reference", uniform_stride=0)
    calls = count_calls(pipe)
    edit(pipe, edit_mask=CORNER)
    assert calls == {2 * 16: 2, 2 * (12 + 16): 7}


def test_uniform_coverage_is_expanded_in_addition_to_the_edit(pipe, edit):
    specedit.install(pipe, steps=(0, 1, 0), uniform_stride=3)
    calls = count_calls(pipe)
    edit(pipe, edit_mask=CORNER)  # cells 00, 01, 10, 11 and uniformly 00, 03, 30, 33
    assert calls == {2 * (16 + 3 * 7): 1}
    report = specedit.report(pipe)
    assert report.edit_mask.sum() == 4 and report.expand_mask.sum() == 7


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_num_inference_steps_rescales(pipe, edit, n):
    specedit.install(pipe, "turbo")
    calls = count_calls(pipe)
    edit(pipe, num_inference_steps=n, edit_mask=CORNER)
    assert sum(calls.values()) == n == specedit.report(pipe).nfe == pipe.num_timesteps


def test_num_inference_steps_must_be_a_positive_integer(pipe, edit):
    specedit.install(pipe, "turbo")
    for value, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="num_inference_steps: expected an integer of at least 1, got"):
            edit(pipe, num_inference_steps=value)


def test_true_cfg_runs_two_branches(pipe, edit):
    specedit.install(pipe, **QUICK)
    calls = count_calls(pipe)
    plain = edit(pipe)
    guided = edit(pipe, negative_prompt="dull", true_cfg_scale=3.0)
    assert sum(calls.values()) == 8 + 16
    assert (guided - plain).abs().max() > 1e-3
    flops = {stage.name: stage.flops for stage in specedit.report(pipe).stages}
    edit(pipe)
    halves = {stage.name: stage.flops for stage in specedit.report(pipe).stages}
    assert flops["coarse"] == 2 * halves["coarse"] > 0


def test_the_report_of_a_run(pipe, edit):
    specedit.install(pipe, "turbo")
    edit(pipe, output_type="pil")
    report = specedit.report(pipe)
    assert report.preset == "turbo" and report.config == SpecEditConfig.preset("turbo")
    assert report.source.size == report.edit.size == (128, 128)
    assert report.seconds > 0 and sum(stage.seconds for stage in report.stages) <= report.seconds
    assert report.flops == sum(stage.flops for stage in report.stages)
    width, tokens = 2 * 16, 2 * 64 + 16
    assert report.stock_steps == 28  # Kontext's own default
    assert report.flops_stock == 28 * tokens * 2 * (24 * width**2 + 4 * width * tokens)
    assert (report.expand_mask | ~report.edit_mask).all()

"""Locked cells that leave the target: locked="cached" and locked="reference"."""

import numpy as np
import pytest
import torch

import specedit
from specedit.forecast.kv_cache import LOCKED_RESET, LockedKVCache
from specedit.layout import MixedLayout, TokenGrid
from specedit.method import sampler
from specedit.method.restore import feather
from specedit.models.flux import FluxKontext
from specedit.part_layout import PartLayout
from tests.sampler.common import CENTRE, CORNER, assert_two_single_runs, close, unpacked

QUICK = dict(steps=(2, 2, 2), draft_steps=2, threshold=1.6, dilation=0)
MODES = ["cached", "reference"]


@pytest.fixture
def groups_of(monkeypatch):
    """The groups at the beginning of every stage, by the stage's name."""
    seen = {}
    leave_out = sampler.leave_out_locked

    def keep(run, groups):
        groups = leave_out(run, groups)
        seen[run.trace.stage.name] = [(run.state, group, group.tokens.clone()) for group in groups]
        return groups

    monkeypatch.setattr(sampler, "leave_out_locked", keep)
    return seen


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("locked", MODES)
def test_an_edit_is_finite_and_repeatable(pipe, edit, locked, restore):
    specedit.install(pipe, **QUICK, locked=locked, restore=restore)
    drafted = edit(pipe)
    assert torch.isfinite(drafted).all() and 0 < specedit.report(pipe).expand_fraction < 1
    first = edit(pipe, edit_mask=CORNER)
    report = specedit.report(pipe)
    assert torch.isfinite(first).all() and torch.equal(edit(pipe, edit_mask=CORNER), first) and report.nfe == 6
    specedit.install(pipe, **QUICK, restore=restore, locked="coarse")
    coarse = edit(pipe, edit_mask=CORNER)
    assert specedit.report(pipe).flops > report.flops
    assert (coarse - first).abs().max() > 1e-3


@pytest.mark.parametrize("locked", MODES)
@pytest.mark.parametrize("changes", [{}, {"restore": "reference"}, {"reference_refresh": 2}], ids=str)
def test_with_everything_edited_it_is_the_usual_run(pipe, edit, locked, changes):
    if locked == "cached" and "reference_refresh" in changes:
        pytest.skip("cached keeps keys and values by itself")
    everything, runs = np.ones((128, 128)), []
    for each in ("coarse", locked):
        specedit.install(pipe, **QUICK, **changes, locked=each)
        runs.append(edit(pipe, edit_mask=everything))
    assert torch.equal(*runs)


@pytest.mark.parametrize("locked", MODES)
def test_without_a_mixed_stage_nothing_is_left_out(pipe, edit, locked):
    specedit.install(pipe, steps=(2, 0, 2), locked=locked, keep_pixels=True, threshold=1.6)
    some = edit(pipe)
    specedit.install(pipe, steps=(2, 0, 2), locked="coarse", keep_pixels=True, threshold=1.6)
    assert torch.equal(edit(pipe), some)


@pytest.mark.parametrize("locked", MODES)
def test_cells_that_the_coarse_stage_changes_are_edited_too(pipe, edit, locked):
    """They would be drawn to the reference, so a change that only the main run makes must be seen."""
    specedit.install(pipe, **QUICK, locked=locked, restore="full")
    edit(pipe)
    assert "second look" in [stage.name for stage in specedit.report(pipe).stages]
    specedit.install(pipe, **QUICK | dict(threshold=4.0), locked=locked, restore="full")
    edit(pipe)
    assert specedit.report(pipe).edit_fraction == 1 and specedit.report(pipe).empty_drafts == 1


@pytest.mark.parametrize("locked", MODES)
def test_unedited_cells_are_the_references(pipe, edit, start, locked):
    _, reference = start
    specedit.install(pipe, **QUICK, restore="reference", locked=locked)
    latents = unpacked(pipe, edit(pipe, edit_mask=CORNER))
    weight = feather(specedit.report(pipe).edit_mask, 4, 1, (16, 16))[:, None].expand_as(latents)
    close(latents[weight == 0], reference[weight == 0])
    assert (latents - reference)[weight == 1].abs().min() > 0


@pytest.mark.parametrize("size", [(128, 128), (144, 112)])
@pytest.mark.parametrize("locked", MODES)
def test_locked_states_are_the_reference_with_the_calls_own_noise(pipe, edit, groups_of, locked, size):
    """x_s = (1 - s) r + s e on the fine grid, once a locked cell is expanded: white noise at the state's level."""
    specedit.install(pipe, **QUICK, locked=locked, uniform_stride=0)
    edit(pipe, size=size, edit_mask=np.pad(np.ones((40, 40)), ((0, size[0] - 40), (0, size[1] - 40))))
    ((state, group, tokens),) = groups_of["full"]
    sigma = group.sigmas[0]
    expected = (1 - sigma) * state.aligned + sigma * state.noise
    outside = torch.ones(state.grid.shape, dtype=torch.bool)
    outside[:4, :4] = False
    close(tokens[:, outside.flatten()], expected[:, outside.flatten()])
    assert (tokens - expected)[:, ~outside.flatten()].abs().max() > 1e-2


@pytest.mark.slow
def test_locked_noise_is_white_with_the_states_mean(pipe, edit, groups_of):
    """Over many seeds: mean (1 - s) r, covariance s^2 I, also between neighbouring cells."""
    specedit.install(pipe, steps=(1, 1, 0), locked="reference", restore="reference", uniform_stride=0)
    draws = []
    edit(pipe, edit_mask=CORNER, num_images_per_prompt=400)
    for _, group, tokens in groups_of["mixed"]:
        sigma, locked = group.sigmas[0], group.locked
        draws.append((tokens[:, : locked.reference.shape[1]] - (1 - sigma) * locked.reference) / sigma)
    noise = torch.cat(draws)[:, :4].flatten(1)
    assert noise.mean(0).abs().max() < 5 / len(noise) ** 0.5
    covariance = noise.T @ noise / len(noise)
    assert (covariance - torch.eye(noise.shape[1])).abs().max() < 6 / len(noise) ** 0.5


@pytest.mark.parametrize("locked", MODES)
def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture, locked):
    specedit.install(pipe, **QUICK, restore="reference", locked=locked)
    assert_two_single_runs(pipe, edit, picture, [CORNER, CENTRE])


def test_a_model_that_keeps_locked_cells_agrees_with_all_three(pipe, edit, start, monkeypatch):
    """A model whose velocity points at the reference gives the reference, whatever becomes of locked cells."""

    def velocity(self, run, group, sigma, partial=None):
        from specedit.method.groups import reference_on_layout

        layout = getattr(group.layout, "whole", group.layout)
        wanted = reference_on_layout(run.state.aligned[group.rows], layout)
        wanted = wanted[:, wanted.shape[1] - group.tokens.shape[1] :]
        out = (group.tokens - wanted) / sigma
        return [out if not partial or partial[0].index is None else out[:, partial[0].index[0]]]

    monkeypatch.setattr(FluxKontext, "predict", velocity)
    for locked in ("coarse", *MODES):
        specedit.install(pipe, **QUICK, locked=locked)
        close(unpacked(pipe, edit(pipe, edit_mask=CORNER)), start[1])


def test_resets_come_every_ninth_step(pipe, edit):
    specedit.install(pipe, steps=(1, 12, 0), restore="reference", locked="cached", boundaries=(0.9, 0.5))
    edit(pipe, edit_mask=CORNER)
    report = specedit.report(pipe)
    assert report.reused_steps == 12 - 2 and report.cache_bytes > 0
    kept = LockedKVCache(torch.tensor([[1, 2]]))
    steps = [kept.calls(i, 1)[0] for i in range(LOCKED_RESET + 1)]
    assert [step.index is None for step in steps] == [True, *[False] * (LOCKED_RESET - 1), True]
    assert not any(step.target for step in steps)


def test_a_replaced_prompt_resets_what_is_kept(pipe, edit):
    specedit.install(pipe, steps=(1, 5, 0), restore="reference", locked="cached")

    def replace(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if index == 2 else {}

    edit(pipe, edit_mask=CORNER, callback_on_step_end=replace,
         callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])  # fmt: skip
    assert specedit.report(pipe).reused_steps == 3


@pytest.mark.parametrize("locked", MODES)
def test_latents_that_a_callback_changes_take_effect(pipe, edit, locked):
    specedit.install(pipe, **QUICK, restore="full", locked=locked)

    def double(pipe, index, timestep, tensors):
        assert tensors["latents"].shape == (1, 64, 16)
        return {"latents": tensors["latents"] * (1.5 if index == 2 else 1)}

    plain = edit(pipe, edit_mask=CORNER)
    assert (edit(pipe, edit_mask=CORNER, callback_on_step_end=double) - plain).abs().max() > 1e-2


def test_cells_are_left_out_also_where_an_adapter_cannot_skip_tokens(pipe, edit, monkeypatch):
    specedit.install(pipe, **QUICK, locked="reference")
    expected = edit(pipe, edit_mask=CORNER)
    monkeypatch.setattr(FluxKontext, "skips_tokens", False)
    specedit.install(pipe, **QUICK, locked="reference")
    assert torch.equal(edit(pipe, edit_mask=CORNER), expected)
    specedit.install(pipe, **QUICK)
    assert not torch.equal(edit(pipe, edit_mask=CORNER), expected)


@pytest.mark.parametrize(
    "changes", [{"attention": "stock"}, {"rope": "phase_aligned"}, {"forecast": "freqca"}], ids=str
)
def test_what_goes_with_cells_that_are_left_out(pipe, edit, changes):
    specedit.install(pipe, steps=(4, 5, 0), restore="reference", locked="reference", draft_steps=2, **changes)
    assert torch.isfinite(edit(pipe, edit_mask=CORNER)).all()


def test_a_part_of_a_layout_has_its_tokens_where_they_were():
    grid = TokenGrid(5, 6)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = True
    whole = MixedLayout(grid, mask)
    part = PartLayout.fine(whole)
    assert part.tokens == len(whole.fine_tokens) == len(part.area) == int(part.area.sum())
    assert torch.equal(part.positions, whole.positions[-part.tokens :]) and part.is_mixed
    tokens = torch.randn(2, part.tokens, 4)
    on_grid = part.full_grid(tokens)
    assert torch.equal(on_grid[:, whole.fine_tokens], tokens) and torch.equal(part.from_full_grid(on_grid), tokens)
    assert (on_grid != 0).any(-1).sum() == 2 * part.tokens

"""Which forward calls a step makes, and under which guidance branches."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from specedit.config import SpecEditConfig
from specedit.layout import MixedLayout, TokenGrid
from specedit.method import offered
from specedit.method.adapter import EditState, LayoutGroup, Run, active_branches
from specedit.method.caches import reference_kv_cache
from specedit.method.denoise import euler_step, group_velocity
from specedit.method.trace import ForwardCall, Trace

PIPE = SimpleNamespace()
GRID = TokenGrid(4, 4)
NOISE = torch.zeros(2, 16, 8)
STATE = EditState(
    grid=GRID, noise=NOISE, reference=NOISE, reference_grid=GRID, generator=None, text_tokens=5,
    branches=2, pixels_per_token=16, negative_text_tokens=3,
)  # fmt: skip


class Recorder:
    """An adapter that notes the calls it gets, and answers with the number of active branches."""

    name, keeps_reference, fixed_reference, fixed_prefix, aligns_phases = "recorder", True, False, False, True

    def __init__(self):
        self.calls = []

    def predict(self, run, group, sigma, partial=None):
        self.calls.append(partial)
        return [torch.ones_like(group.tokens)] * active_branches(run.state, run.config, sigma)

    def velocity(self, run, group, sigma):
        return self.guide(run, self.predict(run, group, sigma))

    def guide(self, run, outputs):
        return len(outputs) * outputs[0]


def make_run(state=STATE, **config):
    return Run(Recorder(), PIPE, SpecEditConfig(**config), state)


def make_group(sigmas=(0.9, 0.6, 0.3, 0.0)):
    layout = MixedLayout.all_fine(GRID)
    return LayoutGroup([0, 1], layout, NOISE, layout, NOISE, list(sigmas))


def test_branches_may_have_texts_of_different_length():
    run = make_run()
    group_velocity(run, make_group(), 0)
    assert run.trace.calls == [ForwardCall("", 37, 5, samples=2), ForwardCall("", 35, 3, samples=2)]
    assert dataclasses.replace(STATE, negative_text_tokens=None).texts == (5, 5)
    assert dataclasses.replace(STATE, branches=1).texts == (5,)


@pytest.mark.parametrize("last_block", [True, False])
def test_a_plain_step_reads_the_target_where_the_last_block_is_trimmed(last_block):
    run = make_run(dataclasses.replace(STATE, trims_last_block=last_block))
    velocity = group_velocity(run, make_group(), 0)
    assert torch.equal(velocity, 2 * torch.ones_like(NOISE)) and run.adapter.calls == [None]
    assert [call.read for call in run.trace.calls] == 2 * [16 if last_block else None]
    assert torch.equal(PIPE._current_timestep, torch.tensor(900.0))


def test_a_step_follows_its_velocity_and_keeps_the_clean_prediction():
    group = make_group()
    euler_step(make_run(), group, 0)
    assert group.clean is None
    torch.testing.assert_close(group.tokens, torch.full_like(NOISE, -0.3 * 2))
    euler_step(make_run(), group, 1, keep_clean=True)
    torch.testing.assert_close(group.clean, torch.full_like(NOISE, -0.6 - 0.6 * 2))


def test_guidance_only_within_its_range():
    run, group = make_run(guidance_range=(0.5, 0.8)), make_group()
    velocities = [group_velocity(run, group, i).mean().item() for i in range(3)]
    assert velocities == [1, 2, 1]
    assert [call.tokens for call in run.trace.calls] == [37, 37, 35, 37]


@pytest.mark.parametrize(("sigma", "branches"), [(0.8, 2), (0.5, 2), (0.81, 1), (0.49, 1)])
def test_both_ends_belong_to_the_range(sigma, branches):
    assert active_branches(STATE, SpecEditConfig(guidance_range=(0.5, 0.8)), sigma) == branches
    assert active_branches(STATE, SpecEditConfig(), sigma) == 2
    assert active_branches(dataclasses.replace(STATE, branches=1), SpecEditConfig(guidance_range=(0.5, 0.8)), 0.6) == 1


def test_a_kept_reference_within_a_guidance_range():
    run = make_run(guidance_range=(0.5, 1.0), reference_refresh=4)
    group = make_group((0.9, 0.7, 0.6, 0.4, 0.2, 0.0))
    group.kv = reference_kv_cache(run)
    for i in range(5):
        group_velocity(run, group, i)
    assert [len(calls) for calls in run.adapter.calls] == [2, 2, 2, 1, 1]
    assert [calls[0].target for calls in run.adapter.calls] == [False, True, True, True, False]
    assert group.reused == 3
    both = [ForwardCall("", 37, 5, samples=2), ForwardCall("", 35, 3, samples=2)]
    alone = [ForwardCall("", 16, 0, 37, samples=2), ForwardCall("", 16, 0, 35, samples=2)]
    assert run.trace.calls == [*both, *alone, *alone, alone[0], both[0]]


def test_an_adapter_that_cannot_keep_the_reference_is_named():
    assert reference_kv_cache(make_run()) is None
    run = make_run(reference_refresh=2)
    run.adapter.keeps_reference = False
    with pytest.raises(ValueError, match="reference_refresh: expected None for recorder, which cannot"):
        offered.check(run.adapter, run.config)


def test_a_stage_row_has_the_mean_tokens_of_its_samples():
    run, coarse, fine = make_run(), make_group(), make_group()
    coarse.layout = coarse.reference_layout = MixedLayout.all_coarse(GRID)
    trace = Trace()
    with trace.running("mixed") as stage:
        stage.start(run, [coarse, fine])
        for i in range(2):
            trace.after_step(run, [coarse, fine], i)
    (row,) = trace.stages
    assert (row.name, row.steps, row.sigma_start, row.sigma_end) == ("mixed", 2, 0.9, 0.3)
    assert row.tokens == (13 + 37) / 2 and row.flops == 0 and row.seconds > 0 and trace.steps == 2

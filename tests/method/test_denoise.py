"""What a step costs, and which guidance branches it runs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from specedit.config import SpecEditConfig
from specedit.cost.flops import transformer_flops
from specedit.layout import MixedLayout, TokenGrid
from specedit.method.adapter import EditState, active_branches
from specedit.method.denoise import LayoutGroup, forward_flops, group_velocity, reference_kv_cache

MODEL = dict(num_layers=3, num_attention_heads=2, attention_head_dim=4)
PIPE = SimpleNamespace(transformer=SimpleNamespace(config=MODEL))
GRID = TokenGrid(4, 4)
NOISE = torch.zeros(2, 16, 8)
STATE = EditState(
    grid=GRID, noise=NOISE, reference=NOISE, reference_grid=GRID, generator=None, text_tokens=5,
    branches=2, pixels_per_token=16, negative_text_tokens=3,
)  # fmt: skip


class Recorder:
    """An adapter that notes the calls it gets, and answers with the number of active branches."""

    name, keeps_reference = "recorder", True

    def __init__(self):
        self.calls = []

    def branches(self, pipe, state, tokens, sigma, *more):
        self.calls.append(more[-1])
        return [torch.ones_like(tokens)] * active_branches(state, more[-2], sigma)

    def velocity(self, *call):
        return self.guide(call[1], self.branches(*call, None))

    def guide(self, state, outputs):
        return len(outputs) * outputs[0]


def make_part(sigmas=(0.9, 0.6, 0.3, 0.0)):
    layout = MixedLayout.all_fine(GRID)
    return LayoutGroup([0, 1], layout, NOISE, layout, NOISE, list(sigmas))


def test_branches_may_have_texts_of_different_length():
    flops = forward_flops(PIPE, STATE, 32, 2)
    assert flops == transformer_flops(MODEL, 37) + transformer_flops(MODEL, 35)
    assert forward_flops(PIPE, STATE, 32, 1) == transformer_flops(MODEL, 37)
    same = dataclasses.replace(STATE, negative_text_tokens=None)
    assert forward_flops(PIPE, same, 32, 2) == 2 * transformer_flops(MODEL, 37)


def test_a_step_over_the_target_attends_to_all():
    flops = forward_flops(PIPE, STATE, 16, 2, kept=16, text=False, read=16)
    assert flops == transformer_flops(MODEL, 16, 37, 16) + transformer_flops(MODEL, 16, 35, 16)


@pytest.mark.parametrize("last_block", [True, False])
def test_a_plain_step(last_block):
    adapter, part = Recorder(), make_part()
    state = dataclasses.replace(STATE, last_block=last_block)
    velocity = group_velocity(adapter, PIPE, state, part, 0, SpecEditConfig())
    assert torch.equal(velocity, 2 * torch.ones_like(NOISE)) and adapter.calls == [None]
    assert part.flops == 2 * forward_flops(PIPE, state, 32, 2, read=16 if last_block else None)


def test_guidance_only_within_its_range():
    config = SpecEditConfig(guidance_range=(0.5, 0.8))
    adapter, part = Recorder(), make_part()
    velocities = [group_velocity(adapter, PIPE, STATE, part, i, config).mean().item() for i in range(3)]
    assert velocities == [1, 2, 1]
    assert part.flops == 2 * (2 * forward_flops(PIPE, STATE, 32, 1) + forward_flops(PIPE, STATE, 32, 2))


@pytest.mark.parametrize(("sigma", "branches"), [(0.8, 2), (0.5, 2), (0.81, 1), (0.49, 1)])
def test_both_ends_belong_to_the_range(sigma, branches):
    assert active_branches(STATE, SpecEditConfig(guidance_range=(0.5, 0.8)), sigma) == branches
    assert active_branches(STATE, SpecEditConfig(), sigma) == 2
    assert active_branches(dataclasses.replace(STATE, branches=1), SpecEditConfig(guidance_range=(0.5, 0.8)), 0.6) == 1


def test_a_kept_reference_within_a_guidance_range():
    config = SpecEditConfig(guidance_range=(0.5, 1.0), reference_refresh=4)
    adapter, part = Recorder(), make_part((0.9, 0.7, 0.6, 0.4, 0.2, 0.0))
    part.kept = reference_kv_cache(adapter, config)
    for i in range(5):
        group_velocity(adapter, PIPE, STATE, part, i, config)
    assert [len(calls) for calls in adapter.calls] == [2, 2, 2, 1, 1]
    assert [calls[0].target for calls in adapter.calls] == [False, True, True, True, False]
    assert part.reused == 3
    alone = [forward_flops(PIPE, STATE, 16, n, kept=16, text=False) for n in (2, 2, 1)]
    assert part.flops == 2 * (forward_flops(PIPE, STATE, 32, 2) + forward_flops(PIPE, STATE, 32, 1) + sum(alone))


def test_an_adapter_that_cannot_keep_the_reference_is_named():
    adapter = Recorder()
    assert reference_kv_cache(adapter, SpecEditConfig()) is None
    adapter.keeps_reference = False
    with pytest.raises(ValueError, match="reference_refresh: expected None for recorder, which cannot"):
        reference_kv_cache(adapter, SpecEditConfig(reference_refresh=2))

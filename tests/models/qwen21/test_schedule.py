"""Schedules of pipelines that bring their own sigmas."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import specedit
from specedit.models import qwen21
from specedit.models.qwen21.schedule import resampled, why_unusable

OWN = [1.0, 0.9, 0.72, 0.4]


def scheduler(**changes):
    return FlowMatchEulerDiscreteScheduler(**dict(shift=3.0, use_dynamic_shifting=True) | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(time_shift_type="linear"), dict(use_dynamic_shifting=False), dict(shift_terminal=0.02)],
    ids=str,
)
def test_the_whole_schedule_is_stocks_and_a_part_is_a_part_of_it(changes):
    own, tokens = scheduler(**changes), 4096
    stock = scheduler(**changes)
    stock.set_timesteps(sigmas=OWN, mu=1.15)  # of 4,096 tokens
    before = own.sigmas.clone()
    whole = resampled(own, OWN, tokens, 1.0, 0.0, 4)
    torch.testing.assert_close(whole, stock.sigmas, rtol=0, atol=1e-6)
    assert torch.equal(own.sigmas, before)
    for first, last in ((0, 2), (1, 4)):
        part = resampled(own, OWN, tokens, whole[first].item(), whole[last].item(), last - first)
        torch.testing.assert_close(part, whole[first : last + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
@pytest.mark.parametrize("own", [OWN, [0.98, 0.5], [0.4]], ids=str)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 0.7), (0.82, 0.55), (0.7, 0.0)])
def test_sigmas_fall_in_every_stage(own, start, end, steps):
    sigmas = resampled(scheduler(use_dynamic_shifting=False, shift=1.0), own, 64, start, end, steps)
    assert len(sigmas) == steps + 1 and (sigmas.diff() < 0).all()
    assert sigmas[0] <= start and sigmas[-1] == np.float32(end)


def test_what_is_no_schedule():
    assert why_unusable(OWN) is None and why_unusable([1.0]) is None
    for own in ([], [1.0, 1.0], [0.5, 0.9], [1.2, 0.5], [1.0, 0.0]):
        assert "do not fall" in why_unusable(own)


needs_qwen21 = pytest.mark.skipif(qwen21.QwenImage21 is None, reason="this diffusers has no Qwen-Image-2.1")


@pytest.mark.slow
@needs_qwen21
def test_the_pipelines_own_sigmas_decide_the_number_of_steps(family_of):
    family = family_of(sample_sigmas=OWN)
    stock = family.run(family.make())
    pipe = specedit.install(family.make(), steps=(0, 0, 4))
    torch.testing.assert_close(family.run(pipe), stock, rtol=2e-4, atol=2e-4)
    for preset in ("balanced", "lightning-8"):
        specedit.install(pipe, preset)
        for asked in ({}, dict(num_inference_steps=17)):  # which stock ignores too
            assert family.run(pipe, **asked).isfinite().all()
            report = specedit.report(pipe)
            assert report.nfe == report.stock_steps == 4
    specedit.install(pipe, steps=(1, 3, 0), restore="reference")
    family.run(pipe)
    assert [stage.steps for stage in specedit.report(pipe).stages if stage.steps] == [4, 1, 3]
    specedit.install(pipe, method="steps")
    assert family.run(pipe, num_inference_steps=2).isfinite().all() and specedit.report(pipe).nfe == 2


@needs_qwen21
def test_sigmas_that_do_not_fall_run_stock(family_of):
    family = family_of(sample_sigmas=[0.5, 0.9])
    with pytest.warns(UserWarning, match="SpecEdit will run the stock pipeline: its sample_sigmas do not fall"):
        pipe = specedit.install(family.make())
    assert torch.equal(family.run(pipe), family.run(family.make()))

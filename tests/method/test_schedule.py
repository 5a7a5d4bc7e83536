import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from specedit.config import SpecEditConfig, presets
from specedit.method.schedule import Stage, expanded_sigma, stage_sigmas, stages, supported

# scheduler/scheduler_config.json of the published models
CONFIGS = {
    "flux-kontext": dict(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, shift=3.0,
        use_dynamic_shifting=True,
    ),
    "qwen-image-edit": dict(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift=1.0, shift_terminal=0.02,
        time_shift_type="exponential", use_dynamic_shifting=True,
    ),
    "qwen-lightning": dict(
        base_image_seq_len=256, base_shift=1.0986, max_image_seq_len=8192, max_shift=1.0986, shift=1.0,
        use_dynamic_shifting=True,
    ),
    "linear": dict(use_dynamic_shifting=True, time_shift_type="linear"),
    "static": dict(shift=3.0),
    "static-terminal": dict(shift=3.0, shift_terminal=0.1),
    "none": dict(shift=1.0),
}  # fmt: skip


def make(name, **more):
    return FlowMatchEulerDiscreteScheduler(**{**CONFIGS[name], **more})


def stock_sigmas(scheduler, tokens, steps):
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 6000])
@pytest.mark.parametrize("steps", [2, 9, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_interval_is_the_stock_schedule(name, steps, tokens):
    expected = stock_sigmas(make(name), tokens, steps)
    sigmas = stage_sigmas(make(name), tokens, 1.0, 0.0, steps)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    torch.testing.assert_close(sigmas, expected, atol=1e-6, rtol=0)


def test_set_shift_is_respected():
    scheduler = make("static")
    scheduler.set_shift(5.0)
    torch.testing.assert_close(
        stage_sigmas(scheduler, 100, 1.0, 0.0, 10), stock_sigmas(scheduler, 100, 10), atol=1e-6, rtol=0
    )


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.integers(16, 8192),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.95),
    st.integers(1, 30),
)
def test_a_stage_decreases_and_meets_its_ends(name, tokens, start, fraction, steps):
    end = start * fraction
    sigmas = stage_sigmas(make(name), tokens, start, end, steps)
    assert sigmas[0] == torch.tensor(start) and sigmas[-1] == torch.tensor(end)
    assert (sigmas.diff() < 0).all()


def test_interior_lies_on_the_stock_curve():
    # From one stock sigma to another, with the stock's number of steps, the stage is that part of the stock schedule.
    whole = stage_sigmas(make("flux-kontext"), 4096, 1.0, 0.0, 28)
    part = stage_sigmas(make("flux-kontext"), 4096, whole[6].item(), whole[20].item(), 14)
    torch.testing.assert_close(part, whole[6:21], atol=1e-6, rtol=0)


def test_terminal_stretch_of_a_late_stage():
    scheduler = make("qwen-image-edit")
    sigmas = stage_sigmas(scheduler, 4096, 0.7, 0.0, 5)
    assert sigmas[-2].item() == pytest.approx(0.02, abs=1e-6) and sigmas[0] == torch.tensor(0.7)
    assert stage_sigmas(scheduler, 4096, 0.7, 0.0, 1).tolist() == [torch.tensor(0.7).item(), 0.0]
    # A stage that does not end at 0 is not stretched.
    plain = make("qwen-image-edit", shift_terminal=None)
    assert torch.equal(stage_sigmas(scheduler, 4096, 0.7, 0.1, 5), stage_sigmas(plain, 4096, 0.7, 0.1, 5))


def test_scheduler_is_left_alone():
    scheduler = make("flux-kontext")
    before = scheduler.sigmas.clone()
    stage_sigmas(scheduler, 1024, 1.0, 0.5, 4)
    assert torch.equal(scheduler.sigmas, before) and scheduler.step_index is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 1.0, 0.0, 4), "tokens"),
        ((256, 1.0, 0.0, 0), "steps"),
        ((256, 0.5, 0.5, 4), "start"),
        ((256, 0.5, 0.6, 4), "start"),
        ((256, 1.1, 0.0, 4), "start"),
        ((256, 1.0, -0.1, 4), "start"),
        ((256, float("nan"), 0.0, 4), "start"),
    ],
)
def test_wrong_arguments(arguments, word):
    with pytest.raises(ValueError, match=f"{word}.*expected.*got"):
        stage_sigmas(make("flux-kontext"), *arguments)


def test_supported():
    assert supported(make("flux-kontext")) is None
    assert "EulerDiscreteScheduler" in supported(EulerDiscreteScheduler())

    class Subclass(FlowMatchEulerDiscreteScheduler):
        pass

    assert "Subclass" in supported(Subclass())
    assert "NoneType" in supported(None)
    for option in ("use_karras_sigmas", "use_exponential_sigmas", "stochastic_sampling", "invert_sigmas"):
        scheduler = make("static", **{option: True})
        assert option in supported(scheduler)
        with pytest.raises(ValueError, match=option):
            stage_sigmas(scheduler, 256, 1.0, 0.0, 4)


def test_beta_sigmas_are_not_supported():
    scheduler = make("static")
    scheduler.register_to_config(use_beta_sigmas=True)  # the constructor itself would need scipy
    assert "use_beta_sigmas" in supported(scheduler)


@given(st.floats(0, 1))
def test_expanded_sigma_keeps_signal_and_noise_summing_to_one(s):
    up = expanded_sigma(s)
    assert s <= up <= 1
    assert (1 - s) / (1 + s) == pytest.approx(1 - up, abs=1e-12)
    assert up / (2 - up) == pytest.approx(s, abs=1e-12)


def test_expanded_sigma_rejects_what_is_no_sigma():
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sigma: expected"):
            expanded_sigma(wrong)


S1, S2 = 0.7, 0.55
UP1, UP2 = 2 * S1 / (1 + S1), 2 * S2 / (1 + S2)


@pytest.mark.parametrize(
    ("steps", "restore", "expected"),
    [
        ((7, 6, 5), "full", [("coarse", 1.0, S1, 7), ("mixed", UP1, S2, 6), ("full", UP2, 0.0, 5)]),
        ((7, 6, 5), "reference", [("coarse", 1.0, S1, 7), ("mixed", UP1, 0.0, 11)]),
        ((0, 6, 5), "full", [("mixed", 1.0, S2, 6), ("full", UP2, 0.0, 5)]),
        ((7, 0, 5), "full", [("coarse", 1.0, S1, 7), ("full", UP1, 0.0, 5)]),
        ((7, 0, 5), "reference", [("coarse", 1.0, S1, 7), ("mixed", UP1, 0.0, 5)]),
        ((7, 6, 0), "full", [("coarse", 1.0, S1, 7), ("mixed", UP1, 0.0, 6)]),
        ((0, 0, 5), "full", [("full", 1.0, 0.0, 5)]),
        ((0, 0, 5), "reference", [("mixed", 1.0, 0.0, 5)]),
        ((0, 6, 0), "full", [("mixed", 1.0, 0.0, 6)]),
        ((7, 0, 0), "full", [("coarse", 1.0, 0.0, 7)]),
        ((7, 0, 0), "reference", [("coarse", 1.0, 0.0, 7)]),
    ],
)
def test_stages(steps, restore, expected):
    got = stages(SpecEditConfig(steps=steps, restore=restore, boundaries=(S1, S2)))
    assert [dataclasses.astuple(stage) for stage in got] == expected


@pytest.mark.parametrize("name", presets)
@pytest.mark.parametrize("restore", ["full", "reference"])
def test_preset_stages_cover_the_run(name, restore):
    config = dataclasses.replace(presets[name], restore=restore)
    got = stages(config)
    assert all(isinstance(stage, Stage) and stage.start > stage.end for stage in got)
    assert sum(stage.steps for stage in got) == config.nfe
    assert got[0].start == 1.0 and got[-1].end == 0.0
    for before, after in itertools.pairwise(got):
        assert after.start == expanded_sigma(before.end)

"""Qwen-Image-Edit 2509, 2511 and FireRed with Lightning LoRAs: few steps, no guidance, and a shift that is always 3."""

import math

import pytest
import torch

import specedit

pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")


@pytest.fixture
def lightning(make_qwen):
    """A Plus pipeline with the scheduler that the LoRAs' model cards set."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline

    shift = dict(base_shift=math.log(3), max_shift=math.log(3), base_image_seq_len=256, max_image_seq_len=8192)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=None, time_shift_type="exponential", **shift
    )
    return make_qwen(QwenImageEditPlusPipeline, scheduler=scheduler)


@pytest.fixture
def call(picture):
    references = [picture(128, 128, seed=1), picture(160, 96, seed=2)]

    def run(pipe, **more):
        given = dict(image=references, prompt="make it red", true_cfg_scale=1.0, output_type="latent")
        return pipe(**given, height=128, width=128, generator=torch.Generator().manual_seed(1), **more).images

    return run


@pytest.mark.parametrize("steps", [4, 8])
def test_full_resolution_takes_the_noise_levels_of_stock(lightning, call, steps):
    stock = call(lightning, num_inference_steps=steps)
    levels = lightning.scheduler.sigmas
    expected = [3 * t / (1 + 2 * t) for t in torch.linspace(1, 1 / steps, steps).tolist()]
    torch.testing.assert_close(levels, torch.tensor([*expected, 0.0]))  # shifted by 3, whatever the size
    specedit.install(lightning, steps=(0, 0, steps))
    torch.testing.assert_close(call(lightning), stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("preset", "steps"), [("few-4", 4), ("few-8", 8)])
def test_few_step_presets_take_every_reference(lightning, call, preset, steps):
    specedit.install(lightning, preset, threshold=1.15, dilation=0)
    assert torch.isfinite(call(lightning)).all()
    report = specedit.report(lightning)
    assert (report.nfe, report.draft_steps) == (steps, 2) and report.flops_ratio > 0
    assert report.edit_mask.any() and not report.edit_mask.all()
    asked = call(lightning, num_inference_steps=steps)
    assert specedit.report(lightning).nfe == steps and torch.isfinite(asked).all()

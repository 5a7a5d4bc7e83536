"""What a report says of the stock run, and of scores that overflow."""

import inspect

import pytest
import torch

import specedit
from specedit.models.longcat import LongCatImageEdit

QUICK = dict(steps=(1, 1, 1), draft_steps=1)


def test_a_call_is_compared_with_the_pipelines_own_default_or_the_callers_steps(pipe, edit):
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    specedit.install(pipe, **QUICK)
    reports = {}
    for given in ({}, dict(num_inference_steps=4), dict(num_inference_steps=None)):
        edit(pipe, **given)
        reports[given.get("num_inference_steps", default)] = report = specedit.report(pipe)
        assert report.flops_ratio == report.flops_stock / report.flops
        assert report.flops_ratio_50 == pytest.approx(report.flops_ratio * 50 / report.stock_steps)
    own, four, none = reports.values()
    assert default == own.stock_steps == none.stock_steps == 28
    assert four.stock_steps == four.nfe == 4
    assert own.flops_stock == pytest.approx(7 * four.flops_stock)
    assert "28 stock steps take" in str(own) and "4 stock steps take" in str(four)
    assert str(own).startswith("SpecEdit balanced, steps=(1, 1, 1), draft_steps=1: NFE 3")


def test_every_adapters_default_is_that_of_its_pipeline():
    from diffusers import FluxKontextPipeline, QwenImageEditPipeline

    from specedit.cost.flops import MODELS

    for model, pipeline in (("flux-kontext", FluxKontextPipeline), ("qwen-image-edit", QwenImageEditPipeline)):
        default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
        assert specedit.flops.plan("turbo", model, 1024, 1024, 0.2)["stock_steps"] == default
        assert MODELS[model].default_steps == default


def spoil(value, output):
    return (torch.full_like(output[0], value),) if isinstance(output, tuple) else torch.full_like(output, value)


PARTS = {"decoder": lambda vae: vae.decoder.mid_block, "encoder": lambda vae: vae.encoder}
SEMANTIC, REFERENCE, EDGES = {}, dict(restore="reference"), dict(selector="edges")


@pytest.mark.parametrize(
    ("part", "value", "settings"),
    [
        ("decoder", torch.inf, SEMANTIC), ("decoder", torch.inf, REFERENCE), ("decoder", torch.nan, EDGES),
        ("transformer", torch.nan, SEMANTIC), ("transformer", torch.nan, EDGES), ("encoder", torch.nan, SEMANTIC),
    ],
)  # fmt: skip
def test_a_score_that_is_not_finite_is_named_and_everything_is_edited(pipe, edit, hooked, part, value, settings):
    spoiled = pipe.transformer if part == "transformer" else PARTS[part](pipe.vae)
    where = f"the {'transformer' if part == 'transformer' else 'autoencoder'}, torch.float32"
    specedit.install(pipe, **QUICK | settings)
    hooked(spoiled, lambda module, args, output: spoil(value, output))
    with pytest.warns(UserWarning, match=rf"the verification score is not finite \(overflow in {where}\); editing the"):
        edit(pipe)
    report = specedit.report(pipe)
    assert report.overflowed == 1 and report.empty_drafts == 0 and report.edit_fraction == 1.0
    assert "no change" not in str(report) and "1 of 1 scores were not finite" in str(report)


def test_only_the_sample_that_overflows_is_edited_as_a_whole(pipe, edit, hooked):
    def spoil_first(module, args, output):
        output = output.clone()
        output[0] = torch.inf
        return output

    specedit.install(pipe, **QUICK, threshold=4.0)
    hooked(pipe.vae.decoder.conv_in, spoil_first)
    with pytest.warns(UserWarning, match="the verification score is not finite"):
        edit(pipe, num_images_per_prompt=2)
    report = specedit.report(pipe)
    assert report.overflowed == report.empty_drafts == 1
    assert report.edit_mask.flatten(1).all(1).tolist() == [True, False]


def test_longcats_default_steps():
    if LongCatImageEdit is None:
        pytest.skip("this diffusers has no LongCatImageEditPipeline")
    from diffusers import LongCatImageEditPipeline

    from specedit.api.installing import _accelerated_class
    from specedit.api.reporting import stock_steps

    pipe = object.__new__(_accelerated_class(LongCatImageEditPipeline))
    default = inspect.signature(LongCatImageEditPipeline.__call__).parameters["num_inference_steps"].default
    assert stock_steps(pipe, {}) == default and stock_steps(pipe, {"num_inference_steps": 8}) == 8

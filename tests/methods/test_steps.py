"""Fewer stock steps as a method, and what every method goes through."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.methods import Steps


@pytest.mark.parametrize("count", [1, 4])
def test_it_is_the_stock_pipeline_with_fewer_steps(pipe, edit, count):
    stock = edit(pipe, num_inference_steps=count)
    specedit.install(pipe, steps=(0, 0, count))
    own, flops = edit(pipe), specedit.report(pipe).flops
    specedit.install(pipe, method=Steps(count=count))
    assert torch.equal(edit(pipe), own)
    torch.testing.assert_close(own, stock)
    report = specedit.report(pipe)
    assert (report.nfe, report.draft_steps, report.preset) == (count, 0, f"steps, count={count}")
    assert report.flops == flops
    assert report.edit_mask is None and report.edit_fraction == 1


def test_the_calls_steps_take_precedence(pipe, edit):
    specedit.install(pipe, method="steps")
    edit(pipe, num_inference_steps=3)
    assert specedit.report(pipe).nfe == 3


def test_a_mask_keeps_pixels(pipe, edit, picture):
    mask = torch.zeros(128, 128)
    mask[:32, :32] = 1
    specedit.install(pipe, method=Steps(count=2), keep_pixels=True)
    image = edit(pipe, edit_mask=mask, output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    assert torch.equal(image[:, 64:, 64:], source[:, 64:, 64:])
    assert not torch.equal(image[:, :16, :16], source[:, :16, :16])
    assert specedit.report(pipe).edit_fraction == 1 / 16


def test_an_interrupt_stops_it(pipe, edit):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True

    specedit.install(pipe, method=Steps(count=3))
    edit(pipe, callback_on_step_end=stop)
    assert specedit.report(pipe).nfe == 1


def test_a_configuration_with_a_method_survives_its_dictionary():
    config = SpecEditConfig(method=Steps(count=4), keep_pixels=True)
    assert SpecEditConfig(**dataclasses.asdict(config)) == config
    assert config.method_options == Steps(count=4) and SpecEditConfig().method_options is None


def test_published_settings_have_names():
    assert Steps.at("8") == Steps(count=8)
    with pytest.raises(ValueError, match=r"^setting: expected a published one of 'steps' \('50', .*, got '9'"):
        Steps.at("9")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(method="step"), ValueError, r"^method: expected 'specedit' or one of .*did you mean 'steps'"),
        (dict(method=3), ValueError, "^method: expected 'specedit' or one of"),
        (dict(method={"name": "steps", "counts": 3}), TypeError, r"^method: expected fields of Steps \(count\)"),
        (dict(method="steps", steps=(1, 1, 1)), ValueError, "^steps: expected the default, .* with method='steps'"),
        (dict(method="steps", forecast="taylor"), ValueError, "^forecast: expected the default, None"),
        (dict(method="steps", threshold=0.5), ValueError, "^threshold: expected the default, 0.2"),
    ],
)
def test_what_a_configuration_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        SpecEditConfig(**fields)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_options_are_checked(count, error):
    with pytest.raises(error, match=r"^count: expected an integer of at least 1"):
        Steps(count=count)


def test_a_preset_has_no_place_beside_a_method(pipe):
    with pytest.raises(ValueError, match=r"^steps: expected the default"):
        specedit.install(pipe, "turbo", method="steps")
    assert type(pipe).__call__ is type(pipe).__mro__[0].__call__ and not hasattr(pipe, "_specedit")


def test_a_mask_that_nothing_reads_is_an_error_before_any_work(pipe, edit):
    specedit.install(pipe, method="steps")
    pipe.transformer.forward = None
    with pytest.raises(ValueError, match=r"^edit_mask: expected none with method='steps'"):
        edit(pipe, edit_mask=torch.ones(128, 128))


@pytest.mark.parametrize("fields", [dict(method="steps"), dict(selector="uniform", steps=(0, 1, 1))], ids=str)
def test_pixels_that_nothing_keeps_are_warned_of(pipe, edit, fields):
    specedit.install(pipe, keep_pixels=True, **fields)
    for _ in range(2):
        with pytest.warns(UserWarning, match="^keep_pixels not applied, so any pixel may change"):
            edit(pipe, num_inference_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(pipe, num_inference_steps=2, edit_mask=torch.ones(128, 128))

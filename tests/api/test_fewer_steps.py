"""Calls whose num_inference_steps are too few for what the configuration asks for."""

import warnings

import pytest
import torch

import specedit
from tests.api.common import CORNER

FEWER = "num_inference_steps=4 leaves no stage long enough for forecast='taylor'; SpecEdit runs without it"


def test_too_few_steps_for_a_forecast_run_without_it_and_warn_once(pipe, edit):
    specedit.install(pipe)
    expected = edit(pipe, num_inference_steps=4, edit_mask=CORNER)
    specedit.install(pipe, forecast="taylor", forecast_interval=5)
    with pytest.warns(UserWarning, match=FEWER) as given:
        assert torch.equal(edit(pipe, num_inference_steps=4, edit_mask=CORNER), expected)
    assert len(given) == 1
    report = specedit.report(pipe)
    assert report.nfe == 4 and report.cached_steps == 0 and report.config.forecast is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(pipe, num_inference_steps=3, edit_mask=CORNER)
        edit(pipe, edit_mask=CORNER)
    assert specedit.report(pipe).cached_steps > 0  # the installed configuration is as it was


def test_a_longer_interval_than_a_calls_stages_changes_nothing(pipe, edit):
    runs = []
    for interval in (4, 6):
        specedit.install(pipe, steps=(7, 6, 5), forecast="reuse", forecast_interval=interval)
        runs.append(edit(pipe, num_inference_steps=9, edit_mask=CORNER))
        assert specedit.report(pipe).cached_steps > 0
    assert torch.equal(*runs)

"""The protocol, the refresh pattern and the stacked differences."""

import pytest
import torch

from specedit.forecast.base import Differences, full_steps
from specedit.forecast.reuse import ReuseForecaster
from specedit.forecast.taylor import TaylorForecaster


@pytest.mark.parametrize(
    ("steps", "interval", "warmup", "full"),
    [
        (10, 4, 3, {0, 1, 2, 6}),
        (9, 2, 1, {0, 2, 4, 6, 8}),
        (2, 4, 3, {0, 1}),
        (5, 4, 1, {0, 4}),
        (1, 9, 1, {0}),
    ],
)
def test_refresh_pattern(steps, interval, warmup, full):
    assert full_steps(steps, interval, warmup) == [i in full for i in range(steps)]
    forecaster = ReuseForecaster(interval, warmup=warmup)
    seen = set()
    for i in range(steps):
        if forecaster.refresh(i):
            seen.add(i)
            forecaster.observe(i, torch.zeros(1, 2, 3))
    assert seen == full


def test_a_history_is_never_shorter_than_the_method_needs():
    assert TaylorForecaster(4, order=3, warmup=1).warmup == 4
    assert TaylorForecaster(4, order=1, warmup=3).warmup == 3


def test_wrong_order_of_calls(tokens):
    forecaster = TaylorForecaster(4, order=1)
    with pytest.raises(ValueError, match="predict: expected 2 observed steps, got 0"):
        forecaster.predict(1)
    forecaster.observe(2, tokens)
    with pytest.raises(ValueError, match="step: expected one after 2, the last observed, got 2"):
        forecaster.observe(2, tokens)
    with pytest.raises(ValueError, match=r"feature: expected \(1, 6, 4\) as before, got \(1, 5, 4\)"):
        forecaster.observe(3, tokens[:, 1:])
    forecaster.observe(3, tokens)
    with pytest.raises(ValueError, match="step: expected one after 3"):
        forecaster.predict(3)


def test_reset_forgets(tokens):
    forecaster = TaylorForecaster(4, order=1)
    forecaster.observe(0, tokens)
    forecaster.observe(1, tokens)
    assert forecaster.memory == 2 * tokens.numel() * 8
    forecaster.reset()
    assert forecaster.memory == 0 and forecaster.refresh(2)
    forecaster.observe(0, tokens[:, 1:])  # another shape, an earlier step
    with pytest.raises(ValueError, match="got 1"):
        forecaster.predict(1)


def test_differences_of_a_hand_computed_sequence():
    differences = Differences(2)
    for step, value in ((0, 1.0), (2, 5.0), (5, 20.0)):
        differences.observe(step, torch.tensor([value]))
    # D1 = (20 - 5) / 3 = 5, before it (5 - 1) / 2 = 2; D2 = (5 - 2) / 3 = 1
    assert differences.stack[:, 0].tolist() == [20.0, 5.0, 1.0]
    divided = Differences(2, divided=True)
    for step, value in ((0, 1.0), (2, 5.0), (5, 20.0)):
        divided.observe(step, torch.tensor([value]))
    assert divided.stack[:, 0].tolist() == [20.0, 5.0, pytest.approx(3 / 5)]
    assert divided.steps == [5, 2, 0]

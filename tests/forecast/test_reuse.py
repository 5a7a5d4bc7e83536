"""FORA."""

import torch

from specedit.forecast.reuse import ReuseForecaster


def test_constants_and_the_latest_value(tokens, observed):
    forecaster = observed(ReuseForecaster(4), lambda step: tokens * step, (0, 4))
    assert torch.equal(forecaster.predict(5), 4 * tokens) and torch.equal(forecaster.predict(7), 4 * tokens)
    assert forecaster.memory == tokens.numel() * 8

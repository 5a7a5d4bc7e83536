"""FoCa: ODEs with a constant right-hand side, and the published recurrence by hand."""

import pytest
import torch

from specedit.forecast.foca import FoCaForecaster


@pytest.mark.parametrize("gaps", [(0, 1), (0, 1, 2), (0, 4), (0, 1, 2, 6)])
def test_a_constant_slope_is_exact(tokens, observed, gaps):
    def line(step):
        return torch.roll(tokens, 1, 1) + 0.25 * step * tokens

    forecaster = observed(FoCaForecaster(4), line, gaps)
    for x in (1, 2, 3):
        torch.testing.assert_close(forecaster.predict(gaps[-1] + x), line(gaps[-1] + x))


def test_the_scheme_by_hand():
    forecaster = FoCaForecaster(4)
    for step, value in ((0, 0.0), (1, 6.0)):
        forecaster.observe(step, torch.tensor([[[value]]]))
    forecaster.observe(2, torch.tensor([[[18.0]]]))
    # F' = 12, G = 12, P = 4/3*18 - 1/3*6 + 2/3*12 = 30; F = 18 + (12 + (30 - 18)) / 2 = 30
    assert forecaster.predict(3).item() == pytest.approx(30.0)
    # F' = 12 again: 42
    assert forecaster.predict(4).item() == pytest.approx(42.0)
    # a full step that comes out lower: F' = 46 - 42, G = (46 - 18) / 3
    forecaster.observe(5, torch.tensor([[[46.0]]]))
    predictor = 4 / 3 * 46 - 42 / 3 + 2 / 3 * 4
    assert forecaster.predict(6).item() == pytest.approx(46 + (28 / 3 + predictor - 46) / 2)


def test_the_corrector_pulls_the_predictor_back():
    # F' = -F sampled at 0 and 1: the predictor alone goes on along the last slope
    forecaster = FoCaForecaster(4)
    values = [1.0, 0.5, 0.3]
    for step, value in enumerate(values):
        forecaster.observe(step, torch.tensor([[[value]]]))
    forecaster.observe(7, torch.tensor([[[0.1]]]))
    slope = (0.1 - 0.3) / 5
    first = forecaster.predict(8).item()
    assert first == pytest.approx(0.1 + (slope + slope) / 2, abs=1e-6)


def test_forecasts_are_the_same_asked_once_or_step_by_step(tokens, observed):
    def curve(step):
        return tokens * step**2

    one, other = (observed(FoCaForecaster(4), curve, (0, 1, 2)) for _ in range(2))
    one.predict(3)
    one.predict(4)
    torch.testing.assert_close(one.predict(5), other.predict(5))
    torch.testing.assert_close(one.predict(5), other.predict(5))  # asking again changes nothing

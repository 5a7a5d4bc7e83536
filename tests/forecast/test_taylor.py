"""TaylorSeer: what it is exact for, and the published recurrence by hand."""

import math

import pytest
import torch

from specedit.forecast.taylor import TaylorForecaster


def polynomial(tokens, degree):
    return lambda step: sum(torch.roll(tokens, i, 1) * (step / 4) ** i for i in range(degree + 1))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("gaps", [(0, 1, 2, 3), (0, 1, 2, 6), (0, 4, 8, 12), (1, 2, 6, 11)])
def test_lines_are_exact_at_every_order(tokens, observed, order, gaps):
    line = polynomial(tokens, 1)
    forecaster = observed(TaylorForecaster(4, order=order), line, gaps)
    for x in (1, 2, 5):
        torch.testing.assert_close(forecaster.predict(gaps[-1] + x), line(gaps[-1] + x))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("gaps", [(0, 1, 2, 3, 4), (0, 4, 8, 12, 16), (0, 1, 2, 6, 10)])
def test_newton_is_exact_for_polynomials_of_its_order(tokens, observed, order, gaps):
    function = polynomial(tokens, order)
    forecaster = observed(TaylorForecaster(4, order=order, basis="newton"), function, gaps)
    for x in (1, 3):
        torch.testing.assert_close(forecaster.predict(gaps[-1] + x), function(gaps[-1] + x), rtol=1e-6, atol=1e-6)
    higher = polynomial(tokens, order + 1)
    forecaster = observed(TaylorForecaster(4, order=order, basis="newton"), higher, gaps)
    assert (forecaster.predict(gaps[-1] + 3) - higher(gaps[-1] + 3)).abs().max() > 1e-2


def test_the_published_recurrence_by_hand():
    forecaster = TaylorForecaster(4, order=2)
    for step, value in ((0, 1.0), (2, 5.0), (5, 20.0)):
        forecaster.observe(step, torch.tensor([[[value]]]))
    # D = 20, 5, 1 (test_base); two steps on: 20 + 5 * 2 + 1 * 4 / 2
    assert forecaster.predict(7).item() == 32.0


def test_an_exponential_converges_with_the_order():
    errors = []
    for order in (1, 2, 4):
        forecaster = TaylorForecaster(1, order=order, basis="newton")
        for step in range(order + 1):
            forecaster.observe(step, torch.full((1, 1, 1), math.exp(0.2 * step), dtype=torch.float64))
        errors.append(abs(forecaster.predict(order + 1).item() - math.exp(0.2 * (order + 1))))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_unknown_basis():
    with pytest.raises(ValueError, match="basis: expected 'taylor' or 'newton', got 'bernstein'"):
        TaylorForecaster(4, basis="bernstein")

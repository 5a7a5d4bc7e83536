"""HiCache: Hermite expansions, dual scaling, and the published recurrence by hand."""

import math

import numpy as np
import pytest
import torch

from specedit.forecast.hermite import HermiteForecaster, hermite, hermite_coefficients


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_polynomials_are_numpys(count):
    for x in (-0.7, 0.0, 1.3):
        expected = [np.polynomial.hermite.hermval(x, [0] * i + [1]) for i in range(count)]
        np.testing.assert_allclose(hermite(x, count), expected, rtol=1e-12)


def test_dual_scaling():
    # s^i H_i(s x) / i! with s = 1/2, x = 3: 1, 1/2 * 2 * 3/2, 1/4 * (4 * 9/4 - 2) / 2
    assert hermite_coefficients(3, 3, 0.5) == [1.0, 1.5, pytest.approx(7 / 8)]


@pytest.mark.parametrize("scale", [0.5, 0.71])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_expansions_are_exact(tokens, order, scale):
    """A sequence whose differences are given coefficients is forecast as the Hermite expansion with them."""
    coefficients = [torch.roll(tokens, i, 1) for i in range(order + 1)]
    forecaster = HermiteForecaster(1, order=order, scale=scale)
    # backward differences at 0 that equal the coefficients: f(-k) = sum_j (-1)^j binomial(k, j) c_j
    for k in range(order, -1, -1):
        value = sum((-1) ** j * math.comb(k, j) * coefficients[j] for j in range(k + 1))
        forecaster.observe(order - k, value)
    for x in (1, 4):
        expansion = sum(
            c * scale**i * np.polynomial.hermite.hermval(scale * x, [0] * i + [1]) / math.factorial(i)
            for i, c in enumerate(coefficients)
        )
        torch.testing.assert_close(forecaster.predict(order + x), expansion, rtol=1e-6, atol=1e-6)


def test_the_published_recurrence_by_hand():
    forecaster = HermiteForecaster(4, order=2, scale=0.5)
    for step, value in ((0, 1.0), (2, 5.0), (5, 20.0)):
        forecaster.observe(step, torch.tensor([[[value]]]))
    # D = 20, 5, 1; x = 3: 20 + 5 * 3/2 + 1 * 7/8
    assert forecaster.predict(8).item() == 28.375


@pytest.mark.parametrize("scale", [0, 1.5])
def test_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="scale: expected a number above 0, at most 1"):
        HermiteForecaster(4, scale=scale)

"""FreqCa: the two bands, and what each does over time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specedit.forecast.freqca import FreqCaForecaster, LowPass, cosine_matrix
from specedit.forecast.hermite import hermite_coefficients
from specedit.layout import MixedLayout, TokenGrid

GRID = TokenGrid(6, 9)


def layouts():
    mask = torch.zeros(GRID.coarse().shape, dtype=torch.bool)
    mask[1, 1:3] = True
    return {
        "fine": MixedLayout.all_fine(GRID),
        "coarse": MixedLayout.all_coarse(GRID),
        "mixed": MixedLayout(GRID, mask),
    }


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_cosine_matrix_is_orthonormal(n):
    matrix = cosine_matrix(n, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n))
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5))


@pytest.mark.parametrize("kind", ["fine", "coarse", "mixed"])
def test_the_low_band(kind):
    layout = layouts()[kind]
    x = torch.randn(2, layout.tokens, 8, generator=torch.Generator().manual_seed(0))
    low = LowPass(layout, 0.3)
    band = low(x)
    assert band.shape == x.shape and 0 < band.norm() < x.norm()
    constant = torch.ones_like(x)
    torch.testing.assert_close(low(constant), constant)
    if kind != "mixed":
        torch.testing.assert_close(LowPass(layout, 1.0)(x), x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(low(band), band, rtol=1e-5, atol=1e-5)


def test_one_token():
    layout = MixedLayout.all_fine(TokenGrid(1, 1))
    x = torch.randn(1, 1, 4)
    torch.testing.assert_close(LowPass(layout)(x), x)


def test_low_is_reused_and_high_is_forecast():
    layout = layouts()["fine"]
    split = LowPass(layout, 0.3)
    forecaster = FreqCaForecaster(4, split=split, order=2)
    features = [torch.randn(1, layout.tokens, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for step, feature in zip((0, 1, 3), features, strict=True):
        forecaster.observe(step, feature)
    high = [feature - split(feature) for feature in features]
    first, second = high[1] - high[0], (high[2] - high[1]) / 2
    differences = (high[2], second, (second - first) / 2)
    weights = hermite_coefficients(2, 3, 0.71)
    expected = split(features[2]) + sum(w * d for w, d in zip(weights, differences, strict=True))
    torch.testing.assert_close(forecaster.predict(5), expected)
    assert forecaster.memory == 4 * features[0].numel() * 4


def test_memory_grows_with_the_tokens_alone():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            self.seen = max(self.seen, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    layout = MixedLayout.all_fine(TokenGrid(24, 20))
    with Largest() as largest:
        LowPass(layout)(torch.ones(1, 480, 8))
    assert largest.seen == 480 * 8


def test_constants_are_exact():
    layout = layouts()["mixed"]
    x = torch.randn(1, layout.tokens, 8, generator=torch.Generator().manual_seed(0))
    forecaster = FreqCaForecaster(4, split=LowPass(layout), order=2)
    for step in range(3):
        forecaster.observe(step, x)
    torch.testing.assert_close(forecaster.predict(5), x)

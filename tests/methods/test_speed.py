"""SPEED: its switch, its spectral expansion, and the fit of a power spectrum."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import specedit
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import TokenGrid
from specedit.method.schedule import stage_sigmas
from specedit.methods import Speed
from specedit.methods.speed import coarse_noise, dct, dct_matrix, expand, inverse_dct, power_law
from tests.methods import oracle

GEOMETRIES = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])


def test_the_switch_by_hand():
    # 1024 px are 128 latent pixels. The coarse grid reaches 32 cycles: 203.615097 / 32^1.915461 = 0.26654.
    power = 0.26654
    for delta in (0.01, 0.05):
        expected = 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))
        assert Speed(delta=delta).switch_sigma(128, 160) == pytest.approx(expected, rel=1e-4)
    assert Speed().switch_sigma(128, 128) == pytest.approx(0.85266, abs=1e-5)
    assert Speed(delta=0.05).switch_sigma(128, 128) == pytest.approx(0.71804, abs=1e-5)


@pytest.mark.parametrize(("setting", "coarse"), [("1.3x", 18), ("1.6x", 28)])
def test_the_switch_is_at_the_step_that_sglang_documents(setting, coarse):
    """Its table for FLUX.1 at 1024 px: 18 of 50 steps are coarse with delta 0.01, and 28 with 0.05."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    method = Speed.at(setting)
    sigmas = stage_sigmas(scheduler, 4096, 1.0, 0.0, method.count).tolist()
    assert method.switch_step(sigmas, 128, 128) == coarse


@pytest.mark.parametrize(("count", "switch"), [(1, 0), (2, 1), (3, 1)])
def test_a_run_has_a_step_at_full_resolution(count, switch):
    assert Speed(count).switch_step([1 - i / count for i in range(count + 1)], 16, 16) == switch


def test_a_single_step_is_stocks(pipe, edit):
    stock = edit(pipe, num_inference_steps=1)
    specedit.install(pipe, method=Speed(1))
    torch.testing.assert_close(edit(pipe), stock)


def test_the_transform_is_the_orthonormal_dct():
    n = 6
    matrix = dct_matrix(n, torch.zeros(1, dtype=torch.float64))
    for k in range(n):
        for i in range(n):
            scale = math.sqrt((1 if k == 0 else 2) / n)
            assert float(matrix[k, i]) == pytest.approx(scale * math.cos(math.pi * (i + 0.5) * k / n))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    image = oracle.normal(2, 3, 6, 10).double()
    torch.testing.assert_close(inverse_dct(dct(image)), image)


def expanded(geometry, shape, sigma):
    grid = TokenGrid(*shape, geometry)
    cells, channels = grid.coarse(), 2
    sides = [2 * geometry.patch * side for side in cells.shape]
    tokens = oracle.normal(1, cells.tokens, channels * geometry.pixels).double()
    spectrum = oracle.normal(1, channels, *sides, seed=1).double()
    return grid, tokens, spectrum, expand(tokens, sigma, spectrum, grid)


@GEOMETRIES
def test_the_expansion_keeps_the_low_frequencies_exactly(geometry):
    sigma = 0.6
    grid, tokens, spectrum, (fine, target) = expanded(geometry, (4, 6), sigma)
    assert target == pytest.approx(2 * sigma / (1 + sigma))
    after = dct(geometry.to_image(fine, grid.shape)) * (1 + sigma) / 2
    before = dct(geometry.to_image(tokens, grid.coarse().shape))
    height, width = before.shape[-2:]
    torch.testing.assert_close(after[..., :height, :width], before)
    after[..., :height, :width] = sigma * spectrum[..., :height, :width]
    torch.testing.assert_close(after, sigma * spectrum)


@GEOMETRIES
@pytest.mark.parametrize("shape", [(4, 6), (5, 3)], ids=str)
def test_noise_stays_white_of_variance_one(geometry, shape):
    """Of independent coarse and high-frequency noise, by the covariance of the linear map."""
    sigma, grid = 0.6, TokenGrid(*shape, geometry)
    cells = grid.coarse()
    low, sides = cells.tokens * geometry.pixels, [2 * geometry.patch * side for side in cells.shape]
    one = torch.eye(low + math.prod(sides), dtype=torch.float64)  # a sample for each independent number
    tokens = sigma * one[:, :low].reshape(-1, cells.tokens, geometry.pixels)
    spectrum = one[:, low:].reshape(-1, 1, *sides)
    fine, target = expand(tokens, sigma, spectrum, grid)
    columns = fine.flatten(1) / target
    torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64))


@GEOMETRIES
def test_the_signal_is_that_of_the_new_time(geometry):
    sigma, grid = 0.6, TokenGrid(4, 6, geometry)
    flat = torch.full((1, grid.coarse().tokens, geometry.pixels), 1 - sigma, dtype=torch.float64)
    silent = torch.zeros(1, 1, *(geometry.patch * side for side in grid.shape), dtype=torch.float64)
    fine, target = expand(flat, sigma, silent, grid)
    torch.testing.assert_close(fine, torch.full_like(fine, 1 - target))


@GEOMETRIES
@pytest.mark.parametrize("shape", [(8, 12), (7, 9)], ids=str)
def test_the_full_stage_sees_the_calls_own_noise(geometry, shape):
    run = oracle.make_run(Speed(4), shape, geometry)
    oracle.edit(run)
    layout, tokens, sigma = run.adapter.starts[1]
    assert layout.is_fine
    torch.testing.assert_close(tokens, sigma * run.state.noise, rtol=1e-4, atol=1e-4)


def test_coarse_noise_is_white():
    spectrum = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    columns = coarse_noise(spectrum, TokenGrid(4, 4)).flatten(1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(16, dtype=torch.float64))


def test_a_power_law_is_found_again():
    amplitude, decay, side = 50.0, 1.7, 64
    k = torch.arange(side, dtype=torch.float64) / 2
    w = (k[:, None].square() + k.square()).sqrt()
    w[0, 0] = 1
    coefficients = oracle.normal(16, 4, side, side).double() * (amplitude * w**-decay).sqrt()
    found = power_law(inverse_dct(coefficients))
    assert found == pytest.approx((amplitude, decay), rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(count=0), ValueError, r"^count: expected an integer of at least 1, got 0"),
        (dict(delta=0), ValueError, r"^delta: expected a number above 0 and below 1, got 0"),
        (dict(delta=1.0), ValueError, r"^delta: expected a number above 0 and below 1, got 1.0"),
        (dict(delta="x"), TypeError, r"^delta: expected a number above 0 and below 1, got 'x'"),
        (dict(amplitude=-1), ValueError, r"^amplitude: expected a number above 0, got -1"),
        (dict(decay=float("nan")), ValueError, r"^decay: expected a number above 0, got nan"),
        (dict(amplitude=float("inf")), ValueError, r"^amplitude: expected a number above 0, got inf"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Speed(**options)


def test_a_spectrum_that_vanishes_leaves_one_full_step():
    assert Speed(decay=5000.0).switch_sigma(128, 128) == 0

"""expand_tokens and contract_tokens: the algebra, the statistics of the noise, and the layout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specedit_kernels import contract_tokens, expand_tokens, ops, reference


def by_pixels(coarse, sigma, noise, detail):
    """The expansion written on latent images of one row of coarse tokens: (M, C) -> (M, 4, C), in float64."""
    tokens, width = coarse.shape
    channels = width // 4
    fine_sigma = 2 * sigma / (1 + sigma)
    d = fine_sigma * noise.double() + ((1 - fine_sigma) * detail.double() if detail is not None else 0)
    fine = torch.zeros(tokens, 4, width, dtype=torch.float64)
    signs = [(1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1)]  # the Hadamard columns of d1, d2, d3 per pixel
    for m in range(tokens):
        for a in range(2):
            for b in range(2):
                for c in range(channels):
                    c0 = 2 / (1 + sigma) * coarse[m, c * 4 + a * 2 + b].double()
                    detail3 = d[m, a * 2 + b, c]
                    for pixel in range(4):
                        value = c0 + sum(s * x for s, x in zip(signs[pixel], detail3))
                        fine[m, a * 2 + b, c * 4 + pixel] = value / 2
    return fine


@pytest.mark.parametrize("shape", [(3, 8), (1, 64), (5, 4)], ids=str)
@pytest.mark.parametrize("with_detail", [False, True])
def test_formula_and_layout(backend, dtype, device, rng, as_good, shape, with_detail):
    tokens, width = shape
    coarse = torch.randn(shape, generator=rng).to(dtype)
    noise = torch.randn(tokens, 4, width // 4, 3, generator=rng)
    detail = torch.randn(noise.shape, generator=rng).to(dtype) if with_detail else None
    fine, fine_sigma = expand_tokens(
        coarse.to(device), 0.6, noise=noise.to(device), detail=None if detail is None else detail.to(device),
        backend=backend,
    )  # fmt: skip
    assert fine_sigma == pytest.approx(0.75) and fine.dtype == dtype and fine.is_contiguous()
    exact = by_pixels(coarse, 0.6, noise, detail)
    as_good(fine.cpu(), exact, exact.to(dtype))


@pytest.mark.parametrize("shape", [(3, 4, 8), (1, 4, 64), (2, 5, 4, 4), (0, 4, 8)], ids=str)
def test_contraction_by_formula(backend, dtype, device, rng, as_good, shape):
    """The mean of every 2x2 block times 1 + s, child (a, b) becoming pixel (a, b) of its token."""
    fine = torch.randn(shape, generator=rng).to(device, dtype)
    coarse, sigma = contract_tokens(fine, 0.75, backend=backend)
    assert sigma == pytest.approx(0.6) and coarse.dtype == dtype and coarse.is_contiguous()

    def by_formula(x):  # in the dtype of x
        mean = x.unflatten(-1, (-1, 4)).mean(-1)  # (..., M, 4, channels)
        return (1.6 * mean).transpose(-1, -2).flatten(-2)

    as_good(coarse, by_formula(fine.double()), by_formula(fine))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)], ids=str)
def test_leading_axes_and_inverse(backend, dtype, device, rng, lead):
    coarse = torch.randn(*lead, 7, 16, generator=rng).to(device, dtype)
    fine, fine_sigma = expand_tokens(coarse, 0.3, generator=torch.Generator().manual_seed(3), backend=backend)
    assert fine.shape == (*lead, 7, 4, 16)
    back, sigma = contract_tokens(fine, fine_sigma, backend=backend)
    assert sigma == pytest.approx(0.3) and back.shape == coarse.shape
    torch.testing.assert_close(back, coarse, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_strided_views(backend, device, rng):
    base = torch.randn(2, 12, 48, generator=rng).to(device)
    noise = torch.randn(2, 6, 4, 3, 4, generator=rng).to(device).transpose(-1, -2)
    coarse = base[:, ::2, 16:32]
    got, fine_sigma = expand_tokens(coarse, 0.4, noise=noise, detail=noise, backend=backend)
    want, _ = expand_tokens(coarse.contiguous(), 0.4, noise=noise.contiguous(), detail=noise.contiguous(),
                            backend="torch")  # fmt: skip
    torch.testing.assert_close(got, want)
    wide = torch.randn(2, 6, 5, 40, generator=rng).to(device)[:, :, 1:, 4:20]
    torch.testing.assert_close(contract_tokens(wide, 0.5, backend=backend)[0],
                               contract_tokens(wide.contiguous(), 0.5, backend="torch")[0])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(sigma=st.floats(0.001, 0.999), seed=st.integers(0, 2**31), tokens=st.integers(1, 9), channels=st.integers(1, 5))
def test_algebra(sigma, seed, tokens, channels):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(tokens, 4 * channels, generator=g, dtype=torch.float64)
    noise = torch.randn(tokens, 4, channels, 3, generator=g, dtype=torch.float64)
    detail = torch.randn(tokens, 4, channels, 3, generator=g, dtype=torch.float64)
    fine, fine_sigma = expand_tokens(coarse, sigma, noise=noise, detail=detail)
    back, sigma_back = contract_tokens(fine, fine_sigma)
    assert sigma_back == pytest.approx(sigma)
    torch.testing.assert_close(back, coarse)
    d = fine_sigma * noise + (1 - fine_sigma) * detail
    energy = (2 / (1 + sigma) * coarse).square().sum() + d.square().sum()
    torch.testing.assert_close(fine.square().sum(), energy)


@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_noise_is_white(backend, device, sigma):
    """Coarse noise of standard deviation s becomes fine noise of s', uncorrelated between the pixels of a block."""
    g = torch.Generator().manual_seed(5)
    tokens, channels = 1000, 8
    coarse = (sigma * torch.randn(tokens, 4 * channels, generator=g)).to(device)
    fine, fine_sigma = expand_tokens(coarse, sigma, generator=g, backend=backend)
    samples = fine.double().cpu().view(-1, 4)  # the four pixels of a block
    count = samples.shape[0]
    covariance = samples.T @ samples / count / fine_sigma**2
    assert (covariance - torch.eye(4)).abs().max() < 5 * math.sqrt(2 / count)
    assert samples.mean().abs() < 5 * fine_sigma / math.sqrt(4 * count)
    kurtosis = (samples / fine_sigma).pow(4).mean()
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / (4 * count))
    between_tokens = (fine[:-1] * fine[1:]).double().mean() / fine_sigma**2
    assert abs(between_tokens) < 5 / math.sqrt(fine[1:].numel())


def test_signal_is_preserved(device, backend):
    """A constant image at noise level s is the same image at s', up to its (1 - s') share."""
    sigma = 0.5
    coarse = torch.full((4, 8), 1 - sigma, device=device)  # x0 = 1, no noise
    fine, fine_sigma = expand_tokens(coarse, sigma, noise=torch.zeros(4, 4, 2, 3, device=device), backend=backend)
    torch.testing.assert_close(fine, torch.full_like(fine, 1 - fine_sigma))


def test_same_noise_whatever_the_batch(backend, device):
    coarse = torch.zeros(3, 11, 16, device=device)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    alone, _ = expand_tokens(coarse[:1], 0.5, generator=seeded(8), backend=backend)
    batch, _ = expand_tokens(coarse, 0.5, generator=seeded(7, 8, 9), backend=backend)
    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch[0], batch[1])
    one, _ = expand_tokens(coarse, 0.5, generator=seeded(7)[0], backend=backend)
    first, _ = expand_tokens(coarse[:1], 0.5, generator=seeded(7)[0], backend=backend)
    plain, _ = expand_tokens(coarse[0], 0.5, generator=seeded(7)[0], backend=backend)
    assert torch.equal(one[0], first[0]) and torch.equal(first[0], plain)
    assert not torch.equal(one[0], one[1])


def test_noise_is_drawn_from_the_generator_on_the_cpu():
    coarse = torch.randn(2, 5, 16)
    noise = torch.randn(2, 5, 4, 4, 3, generator=torch.Generator().manual_seed(11))
    drawn, _ = expand_tokens(coarse, 0.5, generator=torch.Generator().manual_seed(11), backend="torch")
    assert torch.equal(drawn, expand_tokens(coarse, 0.5, noise=noise, backend="torch")[0])


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_in_kernel_noise_is_philox(backend, device, lead):
    """The operator's seeded form draws the numbers of the reference's Philox, whichever device runs it."""
    coarse = torch.zeros(*lead, 6, 8, device=device)
    for seeds in ([2**61 + 12345], [3, 2**40])[: 1 + len(lead)]:
        seed = torch.tensor(seeds, device=device)
        noise = reference.philox_noise(seed, (*lead, 6, 4, 2, 3))
        got = ops.run(backend, "expand_tokens", (coarse, 0.5, None, seed, None))
        torch.testing.assert_close(got, reference.expand_tokens(coarse, 0.5, noise=noise)[0], atol=1e-5, rtol=1e-5)


def test_philox_is_the_published_generator():
    """Known-answer vectors of Random123: 10 rounds, all-zero and all-one counters and keys."""
    zeros = reference.philox_4x32(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
    assert [int(x) for x in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = torch.full((4, 1), 0xFFFFFFFF)
    assert [int(x) for x in reference.philox_4x32(ones, ones[:2])] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_sigma_outside(backend, sigma):
    with pytest.raises(ValueError, match=r"sigma: expected a value inside \(0, 1\), got"):
        expand_tokens(torch.zeros(2, 8), sigma, backend=backend)
    with pytest.raises(ValueError, match=r"sigma_fine: expected a value inside \(0, 1\), got"):
        contract_tokens(torch.zeros(2, 4, 8), sigma, backend=backend)


def test_bad_input(backend):
    z = torch.zeros(2, 8)
    for call, error, text in [
        (lambda: expand_tokens(z, "0.5"), TypeError, "sigma: expected a number, got str"),
        (lambda: expand_tokens(z, torch.tensor([0.5, 0.6])), ValueError, "tensor of one element"),
        (lambda: expand_tokens(z.int(), 0.5), TypeError, "coarse: expected dtype"),
        (lambda: expand_tokens(z[:, :6], 0.5), ValueError, "divisible by patch"),
        (lambda: expand_tokens(z, 0.5, patch=1), ValueError, "patch: expected 2"),
        (lambda: expand_tokens(z, 0.5, noise=z), ValueError, "noise: expected 4 dimensions"),
        (lambda: expand_tokens(z, 0.5, detail=torch.zeros(2, 4, 3, 3)), ValueError, r"expected shape \(2, 4, 2, 3\)"),
        (lambda: expand_tokens(z, 0.5, generator=3), TypeError, "expected torch.Generator"),
        (lambda: expand_tokens(z, 0.5, generator=[torch.Generator()] * 2), ValueError, r"one per sample \(1\)"),
        (
            lambda: expand_tokens(z, 0.5, generator=torch.Generator(), noise=torch.zeros(2, 4, 2, 3)),
            ValueError,
            "expected None when noise is given",
        ),
        (lambda: contract_tokens(z, 0.5), ValueError, "expected 3 or"),
        (lambda: contract_tokens(torch.zeros(2, 3, 8), 0.5), ValueError, "expected 4 children"),
    ]:
        with pytest.raises(error, match=text):
            call()

"""expand_tokens and contract_tokens: the algebra, the statistics of the noise, and the layout."""

import itertools
import math
import os
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specedit_kernels as kernels
from specedit_kernels import contract_tokens, expand_tokens, ops, reference


@pytest.fixture(params=[2, 1], ids=["packed", "unpacked"])
def patch(request):
    return request.param


def noise_shape(patch, *shape):
    """Of the noise for coarse tokens (..., M, C)."""
    *lead, width = shape
    return (*lead, 4, width // 4, 3) if patch == 2 else (*lead, width, 3)


def as_blocks(fine, patch):
    """Children (..., 4, C) as the 2x2 blocks (..., 4) that their coarse pixels became."""
    return fine.unflatten(-1, (-1, 4)) if patch == 2 else fine.transpose(-1, -2)


def by_pixels(coarse, sigma, noise, detail, patch):
    """The expansion written on latent images of one row of coarse tokens: (M, C) -> (M, 4, C), in float64."""
    if patch == 1:
        return one_pixel_a_token(coarse, sigma, noise, detail)
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


def one_pixel_a_token(coarse, sigma, noise, detail):
    """The same for unpacked tokens: every channel of a token becomes one number of each of its four children."""
    fine_sigma = 2 * sigma / (1 + sigma)
    fine = torch.zeros(coarse.shape[0], 4, coarse.shape[1], dtype=torch.float64)
    for m, c in itertools.product(*map(range, coarse.shape)):
        d1, d2, d3 = fine_sigma * noise[m, c].double()
        if detail is not None:
            d1, d2, d3 = torch.stack([d1, d2, d3]) + (1 - fine_sigma) * detail[m, c].double()
        c0 = 2 / (1 + sigma) * coarse[m, c].double()
        fine[m, 0, c] = (c0 + d1 + d2 + d3) / 2
        fine[m, 1, c] = (c0 - d1 + d2 - d3) / 2
        fine[m, 2, c] = (c0 + d1 - d2 - d3) / 2
        fine[m, 3, c] = (c0 - d1 - d2 + d3) / 2
    return fine


@pytest.mark.parametrize("shape", [(3, 8), (1, 64), (5, 4)], ids=str)
@pytest.mark.parametrize("with_detail", [False, True])
def test_formula_and_layout(backend, dtype, device, rng, as_good, shape, with_detail, patch):
    coarse = torch.randn(shape, generator=rng).to(dtype)
    noise = torch.randn(noise_shape(patch, *shape), generator=rng)
    detail = torch.randn(noise.shape, generator=rng).to(dtype) if with_detail else None
    fine, fine_sigma = expand_tokens(
        coarse.to(device), 0.6, noise=noise.to(device), detail=None if detail is None else detail.to(device),
        patch=patch, backend=backend,
    )  # fmt: skip
    assert fine_sigma == pytest.approx(0.75) and fine.dtype == dtype and fine.is_contiguous()
    exact = by_pixels(coarse, 0.6, noise, detail, patch)
    as_good(fine.cpu(), exact, exact.to(dtype))


@pytest.mark.parametrize("channels", [1, 3, 17])
def test_unpacked_tokens_of_any_width(backend, device, rng, channels):
    """Unpacked tokens have as many channels as the latents, which need not be a multiple of 4."""
    coarse = torch.randn(5, channels, generator=rng)
    noise = torch.randn(5, channels, 3, generator=rng)
    fine, fine_sigma = expand_tokens(coarse.to(device), 0.4, noise=noise.to(device), patch=1, backend=backend)
    torch.testing.assert_close(fine.cpu().double(), one_pixel_a_token(coarse, 0.4, noise, None), atol=1e-6, rtol=1e-6)
    back, _ = contract_tokens(fine, fine_sigma, patch=1, backend=backend)
    torch.testing.assert_close(back.cpu(), coarse)


def test_both_arrangements_give_the_same_picture(backend, device, rng):
    """A latent image expands to the same one, whether its pixels stand in tokens of 2x2 or one by one."""
    channels, height, width = 3, 4, 6
    image = torch.randn(channels, height, width, generator=rng)
    noise = torch.randn(channels, height, width, 3, generator=rng)  # three numbers for every coarse pixel
    h, w = height // 2, width // 2
    packed = image.view(channels, h, 2, w, 2).permute(1, 3, 0, 2, 4).reshape(h * w, 4 * channels)
    packed_noise = noise.view(channels, h, 2, w, 2, 3).permute(1, 3, 2, 4, 0, 5).reshape(h * w, 4, channels, 3)
    unpacked = image.permute(1, 2, 0).reshape(height * width, channels)
    unpacked_noise = noise.permute(1, 2, 0, 3).reshape(height * width, channels, 3)
    of_packed, _ = expand_tokens(packed.to(device), 0.3, noise=packed_noise.to(device), backend=backend)
    of_unpacked, _ = expand_tokens(unpacked.to(device), 0.3, noise=unpacked_noise.to(device), patch=1, backend=backend)
    # (row, column, child row, child column, channel, pixel row, pixel column) of tokens, and (..., channel) of pixels
    first = of_packed.view(h, w, 2, 2, channels, 2, 2).permute(4, 0, 2, 5, 1, 3, 6).reshape(channels, 2 * height, -1)
    second = of_unpacked.view(height, width, 2, 2, channels).permute(4, 0, 2, 1, 3).reshape(channels, 2 * height, -1)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("shape", [(3, 4, 8), (1, 4, 64), (2, 5, 4, 4), (0, 4, 8)], ids=str)
def test_contraction_by_formula(backend, dtype, device, rng, as_good, shape, patch):
    """The mean of every 2x2 block times 1 + s; packed, child (a, b) becomes pixel (a, b) of its token."""
    fine = torch.randn(shape, generator=rng).to(device, dtype)
    coarse, sigma = contract_tokens(fine, 0.75, patch=patch, backend=backend)
    assert sigma == pytest.approx(0.6) and coarse.dtype == dtype and coarse.is_contiguous()

    def by_formula(x):  # in the dtype of x
        mean = as_blocks(x, patch).mean(-1)  # (..., M, 4, channels), unpacked (..., M, C)
        return (1.6 * mean).transpose(-1, -2).flatten(-2) if patch == 2 else 1.6 * mean

    as_good(coarse, by_formula(fine.double()), by_formula(fine))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)], ids=str)
def test_leading_axes_and_inverse(backend, dtype, device, rng, lead, patch):
    coarse = torch.randn(*lead, 7, 16, generator=rng).to(device, dtype)
    generator = torch.Generator().manual_seed(3)
    fine, fine_sigma = expand_tokens(coarse, 0.3, generator=generator, patch=patch, backend=backend)
    assert fine.shape == (*lead, 7, 4, 16)
    back, sigma = contract_tokens(fine, fine_sigma, patch=patch, backend=backend)
    assert sigma == pytest.approx(0.3) and back.shape == coarse.shape
    torch.testing.assert_close(back, coarse, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_strided_views(backend, device, rng, patch):
    base = torch.randn(2, 12, 48, generator=rng).to(device)
    *lead, channels, three = noise_shape(patch, 2, 6, 16)
    noise = torch.randn(*lead, three, channels, generator=rng).to(device).transpose(-1, -2)
    coarse = base[:, ::2, 16:32]
    got, fine_sigma = expand_tokens(coarse, 0.4, noise=noise, detail=noise, patch=patch, backend=backend)
    want, _ = expand_tokens(coarse.contiguous(), 0.4, noise=noise.contiguous(), detail=noise.contiguous(),
                            patch=patch, backend="torch")  # fmt: skip
    torch.testing.assert_close(got, want)
    wide = torch.randn(2, 6, 5, 40, generator=rng).to(device)[:, :, 1:, 4:20]
    torch.testing.assert_close(contract_tokens(wide, 0.5, patch=patch, backend=backend)[0],
                               contract_tokens(wide.contiguous(), 0.5, patch=patch, backend="torch")[0])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(0.001, 0.999), seed=st.integers(0, 2**31), tokens=st.integers(1, 9), channels=st.integers(1, 5),
    patch=st.sampled_from([2, 1]),
)  # fmt: skip
def test_expansion_keeps_energy_and_contraction_is_its_inverse(sigma, seed, tokens, channels, patch):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(tokens, patch * patch * channels, generator=g, dtype=torch.float64)
    shape = noise_shape(patch, *coarse.shape)
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    detail = torch.randn(shape, generator=g, dtype=torch.float64)
    fine, fine_sigma = expand_tokens(coarse, sigma, noise=noise, detail=detail, patch=patch)
    back, sigma_back = contract_tokens(fine, fine_sigma, patch=patch)
    assert sigma_back == pytest.approx(sigma)
    torch.testing.assert_close(back, coarse)
    d = fine_sigma * noise + (1 - fine_sigma) * detail
    energy = (2 / (1 + sigma) * coarse).square().sum() + d.square().sum()
    torch.testing.assert_close(fine.square().sum(), energy)


@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_noise_is_white(backend, device, sigma, patch):
    """Coarse noise of standard deviation s becomes fine noise of s', uncorrelated between the pixels of a block."""
    g = torch.Generator().manual_seed(5)
    tokens, channels = (250 if os.environ.get("TRITON_INTERPRET") == "1" else 1000), 8
    coarse = (sigma * torch.randn(tokens, 4 * channels, generator=g)).to(device)
    fine, fine_sigma = expand_tokens(coarse, sigma, generator=g, patch=patch, backend=backend)
    samples = as_blocks(fine.double().cpu(), patch).reshape(-1, 4)  # the four pixels of a block
    count = samples.shape[0]
    covariance = samples.T @ samples / count / fine_sigma**2
    assert (covariance - torch.eye(4)).abs().max() < 5 * math.sqrt(2 / count)
    assert samples.mean().abs() < 5 * fine_sigma / math.sqrt(4 * count)
    kurtosis = (samples / fine_sigma).pow(4).mean()
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / (4 * count))
    between_tokens = (fine[:-1] * fine[1:]).double().mean() / fine_sigma**2
    assert abs(between_tokens) < 5 / math.sqrt(fine[1:].numel())


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_covariance_of_the_children_by_algebra(sigma, patch):
    """The expansion is linear. Its exact matrix turns independent noise of level s and three normals into s'^2 I."""
    unit, nothing = torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    coarse, noise = nothing.clone(), torch.zeros(noise_shape(patch, 4, 4), dtype=torch.float64)
    coarse[:, 0] = unit[:, 0]  # token 0 shows what z does, tokens 1 to 3 what each normal does
    first = noise[:, 0, 0] if patch == 2 else noise[:, 0]
    first.copy_(unit[:, 1:])
    fine, fine_sigma = expand_tokens(coarse, sigma, noise=noise, patch=patch)
    matrix = (as_blocks(fine, patch)[:, 0, 0] if patch == 2 else as_blocks(fine, patch)[:, 0]).T  # (pixels, inputs)
    deviations = torch.tensor([sigma, 1, 1, 1], dtype=torch.float64)
    mixed = matrix * deviations
    torch.testing.assert_close(mixed @ mixed.T, fine_sigma**2 * unit)
    torch.testing.assert_close((1 - sigma) * matrix[:, 0], torch.full((4,), 1 - fine_sigma, dtype=torch.float64))


def test_signal_is_preserved(device, backend, patch):
    """A constant image at noise level s is the same image at s', up to its (1 - s') share."""
    sigma = 0.5
    coarse = torch.full((4, 8), 1 - sigma, device=device)  # x0 = 1, no noise
    noise = torch.zeros(noise_shape(patch, 4, 8), device=device)
    fine, fine_sigma = expand_tokens(coarse, sigma, noise=noise, patch=patch, backend=backend)
    torch.testing.assert_close(fine, torch.full_like(fine, 1 - fine_sigma))


def test_same_noise_whatever_the_batch(backend, device, patch):
    expand_tokens = partial(kernels.expand_tokens, patch=patch)
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


def test_noise_is_drawn_from_the_generator_on_the_cpu(patch):
    expand_tokens = partial(kernels.expand_tokens, patch=patch, backend="torch")
    coarse = torch.randn(2, 5, 16)
    noise = torch.randn(noise_shape(patch, 2, 5, 16), generator=torch.Generator().manual_seed(11))
    drawn, _ = expand_tokens(coarse, 0.5, generator=torch.Generator().manual_seed(11))
    assert torch.equal(drawn, expand_tokens(coarse, 0.5, noise=noise)[0])


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_in_kernel_noise_is_philox(backend, device, lead, patch):
    """The operator's seeded form draws the numbers of the reference's Philox, whichever device runs it."""
    coarse = torch.zeros(*lead, 6, 8, device=device)
    for seeds in ([2**61 + 12345], [3, 2**40])[: 1 + len(lead)]:
        seed = torch.tensor(seeds, device=device)
        noise = reference.philox_noise(seed, noise_shape(patch, *lead, 6, 8), patch)
        got = ops.run(backend, "expand_tokens", (coarse, 0.5, None, seed, None, patch))
        want = reference.expand_tokens(coarse, 0.5, noise=noise, patch=patch)[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


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
        (lambda: expand_tokens(z[:, :6], 0.5), ValueError, "coarse: expected a channel count divisible by patch"),
        (lambda: contract_tokens(torch.zeros(2, 4, 6), 0.5), ValueError, "fine: expected a channel count divisible by"),
        (lambda: expand_tokens(z, 0.5, noise=torch.zeros(2, 4, 2, 3), patch=1), ValueError, "noise: expected 3 dim"),
        (lambda: expand_tokens(z, 0.5, noise=torch.zeros(2, 8, 3)), ValueError, "noise: expected 4 dimensions"),
        (lambda: expand_tokens(z, 0.5, detail=torch.zeros(2, 4, 3), patch=1), ValueError, r"shape \(2, 8, 3\), got"),
        (lambda: contract_tokens(torch.zeros(2, 3, 8), 0.5, patch=1), ValueError, "fine: expected 4 children"),
        *(
            (partial(call, patch=patch), error, text)
            for call in (
                lambda patch: expand_tokens(z, 0.5, patch=patch),
                lambda patch: contract_tokens(torch.zeros(2, 4, 8), 0.5, patch=patch),
            )
            for patch, error, text in (
                (3, ValueError, r"patch: expected 1 \(unpacked.*or 2 \(packed.*got 3"),
                (0, ValueError, "patch: expected 1 .* got 0"),
                ("2", TypeError, "patch: expected an int, got str"),
                (True, TypeError, "patch: expected an int, got bool"),
                (None, TypeError, "patch: expected an int, got NoneType"),
            )
        ),
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

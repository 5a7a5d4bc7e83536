"""The interpreter's bfloat16 (tests/kernels/bfloat16.py) is PyTorch's, bit for bit."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

BF16 = torch.bfloat16


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _arithmetic(x, y, sums, products, smaller, magnitudes, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(sums + i, a + b)
    tl.store(products + i, a * b)
    tl.store(smaller + i, a < b)
    tl.store(magnitudes + i, tl.where(a < 0, -a, a) + 1.0)


@triton.jit
def _dot(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def hard_values(rng):
    """All magnitudes, both ties, the largest values, infinities, NaN and subnormals."""
    x = torch.randn(4084, generator=rng) * torch.logspace(-38, 38, 4084)
    special = [0.0, -0.0, 3.3895e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40]
    return torch.cat([x, torch.tensor([*special, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -1 - 2**-8])])


def test_casts_round_to_nearest_even(rng):
    x = hard_values(rng)
    want, got = x.to(BF16), torch.empty(4096, dtype=BF16)
    _cast[(1,)](x, got, 4096)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    for dtype in (torch.float32, torch.float16):
        small = want.where(want.abs() < 6e4, 0)
        back = torch.empty(4096, dtype=dtype)
        _cast[(1,)](small, back, 4096)
        assert torch.equal(back, small.to(dtype))
    halves = torch.randn(4096, generator=rng).half()
    _cast[(1,)](halves, got, 4096)
    assert torch.equal(got, halves.to(BF16))


def test_arithmetic_and_comparisons(rng):
    x, y = (torch.randn(512, generator=rng).to(BF16) for _ in range(2))
    sums, products, magnitudes = (torch.empty(512, dtype=BF16) for _ in range(3))
    smaller = torch.empty(512, dtype=torch.bool)
    _arithmetic[(1,)](x, y, sums, products, smaller, magnitudes, 512)
    assert torch.equal(sums, x + y) and torch.equal(products, x * y)
    assert torch.equal(smaller, x < y) and torch.equal(magnitudes, x.abs() + 1)


def test_products_of_matrices_accumulate_in_float32(rng):
    a, b = (torch.randn(16, 16, generator=rng).to(BF16) for _ in range(2))
    c = torch.empty(16, 16)
    _dot[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float())

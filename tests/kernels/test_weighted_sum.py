"""weighted_sum against a sum in float64."""

import pytest
import torch

from specedit_kernels import weighted_sum

SHAPES = [(1, 7), (3, 1), (3, 2, 33, 64), (5, 1, 1025), (2, 0, 8), (4, 3000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(backend, dtype, device, rng, as_good, shape):
    stack = torch.randn(shape, generator=rng).to(device, dtype)
    weights = torch.randn(shape[0], generator=rng).to(device)
    y = weighted_sum(stack, weights, backend=backend)
    exact = torch.einsum("k...,k->...", stack.double(), weights.double())
    assert y.dtype == dtype and y.is_contiguous() and y.shape == shape[1:]
    as_good(y, exact, torch.einsum("k...,k->...", stack, weights.to(dtype)))


def test_a_taylor_series_by_hand(backend, device):
    stack = torch.tensor([[20.0], [5.0], [1.0]], device=device)
    assert weighted_sum(stack, torch.tensor([1.0, 2.0, 2.0], device=device), backend=backend).tolist() == [32.0]


def test_strided_stack(backend, device, rng):
    base = torch.randn(4, 6, 10, generator=rng).to(device)
    stack = base.transpose(1, 2)[::2, 1:9]
    weights = torch.tensor([0.5, -2.0], device=device)
    torch.testing.assert_close(weighted_sum(stack, weights, backend=backend), 0.5 * stack[0] - 2 * stack[1])


def test_products_are_not_rounded_before_they_are_added(backend, dtype, device, rng):
    """Terms that cancel leave nothing; a product rounded to a half would leave its rounding."""
    y = torch.randn(1000, generator=rng).to(device, dtype)
    left = weighted_sum(torch.stack([y, y]), torch.tensor([0.3, -0.3], device=device), backend=backend)
    assert left.abs().max() < 1e-6


def test_unsuitable_inputs_are_rejected(backend, device):
    stack, weights = torch.zeros(3, 4, device=device), torch.zeros(3, device=device)
    for arguments, error, message in (
        ((stack, weights[:2]), ValueError, r"weights: expected shape \(3,\), got \(2,\)"),
        ((stack, weights.double()), TypeError, "weights: expected dtype float32, got float64"),
        ((stack.long(), weights), TypeError, "stack: expected dtype float16"),
        ((stack[:0], weights[:0]), ValueError, "stack: expected at least one layer"),
        (([1, 2], weights), TypeError, "stack: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            weighted_sum(*arguments, backend=backend)
    with pytest.raises(ValueError, match="backend: expected one of"):
        weighted_sum(stack, weights, backend="cuda")

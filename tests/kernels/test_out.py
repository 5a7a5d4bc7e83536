"""`out=`: results are written into tensors of the caller, on every backend."""

import pytest
import torch

import specedit_kernels as kernels


@pytest.fixture
def calls(device, rng, backend):
    """Each operator as a call that takes `out`, with the result that it returns without one."""
    x, index = torch.randn(2, 9, 8, generator=rng).to(device), torch.tensor([3, 0, 8], device=device)
    q, k = (torch.randn(2, n, 2, 16, generator=rng).to(device) for n in (5, 7))
    noise = torch.randn(2, 9, 4, 2, 3, generator=rng).to(device)
    fine = torch.randn(2, 9, 4, 8, generator=rng).to(device)
    weights = torch.randn(2, generator=rng).to(device)
    return {
        "gather": lambda out=None: kernels.gather_tokens(x, index, out=out, backend=backend),
        "gather, one table": lambda out=None: kernels.gather_tokens(x[0], index, out=out, backend=backend),
        "expand": lambda out=None: kernels.expand_tokens(x, 0.5, noise=noise, out=out, backend=backend)[0],
        "contract": lambda out=None: kernels.contract_tokens(fine, 0.5, out=out, backend=backend)[0],
        "sum": lambda out=None: kernels.weighted_sum(x, weights, out=out, backend=backend),
        "attention": lambda out=None: kernels.mixed_attention(q, k, k, out=out, backend=backend),
    }


def test_results_are_written_into_out(calls):
    for name, call in calls.items():
        want = call()
        out = torch.full_like(want, float("nan"))
        assert call(out=out) is out and torch.equal(out, want), name


def test_lse_is_written_into_the_second_of_a_pair(backend, device, rng):
    q, k = (torch.randn(2, n, 2, 16, generator=rng).to(device) for n in (5, 7))
    want = kernels.mixed_attention(q, k, k, return_lse=True, backend=backend)
    pair = torch.full_like(q, float("nan")), torch.full((2, 2, 5), float("nan"), device=device)
    got = kernels.mixed_attention(q, k, k, return_lse=True, out=pair, backend=backend)
    assert got is pair and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_unsuitable_out_is_rejected(calls, device, backend):
    for name, call in calls.items():
        want = call()
        for out, error, text in (
            (want[..., :4], ValueError, "out: expected shape"),
            (want.double(), TypeError, "out: expected dtype float32, got float64"),
            (want.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "out: expected a contiguous tensor"),
            (want.to("meta"), ValueError, "out: expected device"),
        ):
            with pytest.raises(error, match=text):
                call(out=out)
        assert torch.equal(call(), want), name
    q = torch.zeros(1, 5, 2, 16, device=device)
    with pytest.raises(ValueError, match="out: expected no memory in common with q"):
        kernels.mixed_attention(q, q, q, out=q, backend=backend)
    with pytest.raises(ValueError, match=r"out: expected a pair \(out, lse\) with return_lse, got Tensor"):
        kernels.mixed_attention(q, q, q, return_lse=True, out=torch.zeros_like(q), backend=backend)
    with pytest.raises(TypeError, match=r"out: expected a torch\.Tensor, got tuple"):
        kernels.mixed_attention(q, q, q, out=(torch.zeros_like(q), q), backend=backend)

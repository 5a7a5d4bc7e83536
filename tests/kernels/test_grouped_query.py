"""Grouped-query attention: query head h reads key head h // (H // H_kv), in every layout and on every backend."""

import math

import pytest
import torch

from specedit_kernels import mixed_attention
from specedit_kernels.diffusers_backend import attention
from tests.kernels.shipped import fitting

GROUPS = [(4, 2), (3, 1), (2, 2)]  # heads of q, heads of k and v
# Each with a bias in one layout and without in the other: heads and bias are independent in the kernels.
PACKED, DENSE = list(zip(GROUPS, (True, False, True))), list(zip(GROUPS, (False, True, False)))


def softmax_attention(q, k, v, bias, dtype):
    """One sequence, q (N, H, D), k and v (K, H_kv, D), bias (K,) or None -> out (N, H, D), lse (H, N), in `dtype`."""
    q = q.to(dtype).transpose(0, 1)
    k, v = (x.to(dtype).transpose(0, 1).repeat_interleave(q.shape[0] // x.shape[1], dim=0) for x in (k, v))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(dtype)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
    return (weights @ v).transpose(0, 1), lse


def randn(rng, device, dtype, *shape):
    return torch.randn(shape, generator=rng).to(device, dtype)


def hiding_bias(rng, device, *shape):
    bias = torch.randn(shape, generator=rng)
    bias[..., ::3] = -math.inf
    return bias.to(device)


@pytest.mark.parametrize("heads, with_bias", PACKED, ids=str)
def test_packed(backend, dtype, device, rng, as_good, heads, with_bias):
    q_lengths, k_lengths = fitting([(70, 0, 3), (65, 40, 1)], dtype)
    q = randn(rng, device, dtype, sum(q_lengths), heads[0], 32)
    k, v = (randn(rng, device, dtype, sum(k_lengths), heads[1], 32) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (q_lengths, k_lengths))
    bias = hiding_bias(rng, device, k.shape[0]) if with_bias else None
    arguments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "key_bias": bias, "backend": backend}
    out, lse = mixed_attention(q, k, v, **arguments, return_lse=True)
    only = mixed_attention(q, k, v, **arguments)
    assert out.shape == q.shape and lse.shape == (heads[0], q.shape[0]) and out.is_contiguous()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        part = q[a:b], k[c:d], v[c:d], None if bias is None else bias[c:d]
        (exact, exact_lse), (same, same_lse) = (softmax_attention(*part, t) for t in (torch.float64, dtype))
        as_good(out[a:b], exact, same)
        as_good(only[a:b], exact, same)
        as_good(lse[:, a:b], exact_lse, same_lse)


@pytest.mark.parametrize("heads, with_bias", DENSE, ids=str)
def test_dense(backend, dtype, device, rng, as_good, heads, with_bias):
    ((queries, keys),) = fitting([(37, 70)], dtype)
    q = randn(rng, device, dtype, 2, queries, heads[0], 64)
    k, v = (randn(rng, device, dtype, 2, keys, heads[1], 64) for _ in range(2))
    bias = hiding_bias(rng, device, 2, keys) if with_bias else None
    out, lse = mixed_attention(q, k, v, key_bias=bias, return_lse=True, backend=backend)
    only = mixed_attention(q, k, v, key_bias=bias, backend=backend)
    for b in range(2):
        part = q[b], k[b], v[b], None if bias is None else bias[b]
        (exact, exact_lse), (same, same_lse) = (softmax_attention(*part, t) for t in (torch.float64, dtype))
        as_good(out[b], exact, same)
        as_good(only[b], exact, same)
        as_good(lse[b], exact_lse, same_lse)


def test_strided_keys_and_few_tokens(backend, device, rng):
    """Every second head of a wider tensor, one query, and no keys at all."""
    q, wide = randn(rng, device, torch.float32, 1, 1, 4, 16), randn(rng, device, torch.float32, 1, 9, 4, 16)
    got = mixed_attention(q, wide[:, :, ::2], wide[:, :, 1::2], backend=backend)
    want = softmax_attention(q[0], wide[0, :, ::2], wide[0, :, 1::2], None, torch.float64)[0]
    torch.testing.assert_close(got[0].double(), want, atol=1e-5, rtol=1e-5)
    out, lse = mixed_attention(q, wide[:, :0, :2], wide[:, :0, :2], return_lse=True, backend=backend)
    assert not out.any() and bool((lse == -math.inf).all()) and lse.shape == (1, 4, 1)


@pytest.mark.parametrize("heads", [(4, 3), (2, 4), (4, 0), (0, 2)], ids=str)
def test_heads_that_do_not_divide(backend, device, heads):
    q, k = torch.zeros(1, 5, heads[0], 16, device=device), torch.zeros(1, 5, heads[1], 16, device=device)
    with pytest.raises(ValueError, match=rf"k: expected as many heads as q has \({heads[0]}\) or a divisor of it, got"):
        mixed_attention(q, k, k, backend=backend)


def test_meta_tensors_have_the_shapes_of_real_ones(device):
    q, k = torch.zeros(7, 4, 16, device=device), torch.zeros(9, 2, 16, device=device)
    cu_q, cu_k = (torch.tensor([0, 3, n], dtype=torch.int32, device=device) for n in (7, 9))
    operator = torch.ops.specedit_kernels.mixed_attention
    real = operator(q, k, k, cu_q, cu_k, None, None, 0.25, True)
    meta = operator(*(x.to("meta") for x in (q, k, k, cu_q, cu_k)), None, None, 0.25, True)
    assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in meta]


def test_keys_are_not_repeated(device, rng):
    """Expanding k and v by hand gives the same, so the derivatives must sum over the heads that share a key."""
    q = randn(rng, device, torch.float64, 1, 5, 4, 8)
    k, v = (randn(rng, device, torch.float64, 1, 6, 2, 8).requires_grad_() for _ in range(2))
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    weight = randn(rng, device, torch.float64, *q.shape)
    got = torch.autograd.grad((mixed_attention(q, k, v, backend="torch") * weight).sum(), (k, v))
    want = torch.autograd.grad((mixed_attention(q, *repeated, backend="torch") * weight).sum(), (k, v))
    for a, b in zip(got, want):
        assert a.shape == (1, 6, 2, 8)
        torch.testing.assert_close(a, b)


def test_diffusers_backend(device, rng):
    q = randn(rng, device, torch.float32, 2, 7, 4, 16)
    k, v = (randn(rng, device, torch.float32, 2, 9, 2, 16) for _ in range(2))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, enable_gqa=True), want)
    with pytest.raises(ValueError, match="enable_gqa: expected True for 4 query heads and 2 key heads, got False"):
        attention(q, k, v)

"""mixed_attention against softmax attention written out in float64."""

import math
import os
import warnings
from itertools import product

import pytest
import torch

from specedit_kernels import available_backends, checks, mixed_attention
from tests.kernels.shipped import fitting


def softmax_attention(q, k, v, bias, scale, dtype):
    """One sequence, q (N, H, D), k and v (K, H, D), bias (K,) or None -> out (N, H, D), lse (H, N), in `dtype`."""
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    logits = q @ k.transpose(1, 2) * scale
    if bias is not None:
        logits = logits + bias.to(dtype)
    peak = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_full((*logits.shape[:-1], 1), -math.inf)
    weights = torch.exp(logits - peak.masked_fill(peak == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    out = (weights / total.masked_fill(total == 0, 1)) @ v
    return out.transpose(0, 1), (peak + total.log()).squeeze(-1)


def packed(rng, device, dtype, heads, dim, q_lengths, k_lengths):
    q, k, v = (torch.randn(sum(n), heads, dim, generator=rng).to(device, dtype)
               for n in (q_lengths, k_lengths, k_lengths))  # fmt: skip
    ends = [torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (q_lengths, k_lengths)]
    return q, k, v, *ends


def expected(q, k, v, cu_q, cu_k, bias, scale, dtype):
    outs, lses = [], []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        out, lse = softmax_attention(q[a:b], k[c:d], v[c:d], None if bias is None else bias[c:d], scale, dtype)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


LENGTHS = [  # queries and keys of each sequence
    ([5], [9]),
    ([70, 0, 3, 130], [65, 40, 129, 1]),
    ([0, 33], [17, 0]),
    ([1] * 6, [3] * 5 + [200]),
    ([0, 0], [0, 4]),
    ([128, 64], [128, 64]),
]
# Heads, bias and lengths are independent in the kernels; in the interpreter each value is tried once.
PACKED = (
    [(lengths, 16 if i % 2 else 64, bool(i % 2)) for i, lengths in enumerate(LENGTHS)]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else list(product(LENGTHS, (16, 64), (False, True)))
)


@pytest.mark.parametrize("lengths, dim, with_bias", PACKED, ids=str)
def test_packed(backend, dtype, device, rng, as_good, lengths, dim, with_bias):
    lengths = fitting(lengths, dtype)
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, 2, dim, *lengths)
    bias = None
    if with_bias:
        bias = torch.randn(k.shape[0], generator=rng).to(device)
        bias[::3] = -math.inf
    scale = dim**-0.5
    exact, exact_lse = expected(q, k, v, cu_q, cu_k, bias, scale, torch.float64)
    same, same_lse = expected(q, k, v, cu_q, cu_k, bias, scale, dtype)
    longest = max(lengths[0])
    out, lse = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest, key_bias=bias,
                               return_lse=True, backend=backend)  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    as_good(out, exact, same)
    as_good(lse, exact_lse, same_lse)
    only = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, backend=backend)
    as_good(only, exact, same)


@pytest.mark.parametrize("dim", [32, 48, 128, 144, 256])
def test_head_dims(backend, device, rng, as_good, dim):
    dtype = torch.float32 if dim <= 128 else torch.float16
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, 1, dim, [40], [70])
    exact, _ = expected(q, k, v, cu_q, cu_k, None, 0.3, torch.float64)
    same, _ = expected(q, k, v, cu_q, cu_k, None, 0.3, dtype)
    out = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=0.3, backend=backend)
    as_good(out, exact, same)


@pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")
def test_head_dims_a_gpu_does_not_take(device):
    for dim, dtype in ((24, torch.float16), (272, torch.float16), (144, torch.float32)):
        q = torch.zeros(1, 4, 1, dim, dtype=dtype, device=device)
        with pytest.raises(ValueError, match="q: expected a head dim"):
            mixed_attention(q, q, q, backend="triton")


@pytest.mark.parametrize("shape", [(2, 37, 70, 2), (1, 64, 128, 1), (2, 3, 0, 2), (2, 0, 5, 1)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense(backend, dtype, device, rng, as_good, shape, with_bias):
    batch, queries, keys, heads = shape
    q, k, v = (torch.randn(batch, n, heads, 32, generator=rng).to(device, dtype) for n in (queries, keys, keys))
    bias = torch.randn(batch, keys, generator=rng).to(device) if with_bias else None
    out, lse = mixed_attention(q, k, v, key_bias=bias, return_lse=True, backend=backend)
    assert lse.shape == (batch, heads, queries)
    only = mixed_attention(q, k, v, key_bias=bias, backend=backend)
    for b in range(batch):
        row = None if bias is None else bias[b]
        exact, exact_lse = softmax_attention(q[b], k[b], v[b], row, 32**-0.5, torch.float64)
        same, same_lse = softmax_attention(q[b], k[b], v[b], row, 32**-0.5, dtype)
        as_good(out[b], exact, same)
        as_good(only[b], exact, same)
        as_good(lse[b], exact_lse, same_lse)


def test_strided_views(backend, device, rng):
    base = torch.randn(90, 3, 4, 2, 32, generator=rng).to(device)
    q, k, v = (base[::2, i, ::2, 1] for i in range(3))  # (45, 2, 32)
    cu = torch.tensor([0, 20, 45], dtype=torch.int32, device=device)
    bias = torch.randn(90, generator=rng).to(device)[::2]
    got = mixed_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, key_bias=bias, backend=backend)
    want = mixed_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens_q=cu, cu_seqlens_k=cu,
                           key_bias=bias.contiguous(), backend="torch")  # fmt: skip
    torch.testing.assert_close(got, want)
    heads_first = base[:40, :, :, 0].permute(1, 2, 0, 3).contiguous()  # (3, 4, 40, 32)
    q, k, v = (heads_first[i].transpose(0, 1)[None] for i in range(3))
    got = mixed_attention(q, k, v, backend=backend)
    want = mixed_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="torch")
    torch.testing.assert_close(got, want)
    odd_base = torch.randn(2, 10, 2, 33, generator=rng).to(device)[..., 1:]  # rows that are not 16-byte aligned
    got = mixed_attention(odd_base, odd_base, odd_base, backend=backend)
    want = mixed_attention(*[odd_base.contiguous()] * 3, backend="torch")
    torch.testing.assert_close(got, want)


def test_all_keys_hidden(backend, dtype, device, rng):
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, 2, 32, [20, 30], [70, 10])
    bias = torch.zeros(80, device=device)
    bias[:70] = -math.inf
    out, lse = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, return_lse=True,
                               backend=backend)  # fmt: skip
    assert not out[:20].any() and torch.equal(lse[:, :20], torch.full_like(lse[:, :20], -math.inf))
    assert out[20:].isfinite().all() and lse[:, 20:].isfinite().all()
    only = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, backend=backend)
    assert not only[:20].any()


def test_hidden_head_of_a_long_sequence(backend, device, rng, as_good):
    """The first blocks of keys are hidden whole: the running maximum starts at -inf and must stay harmless."""
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 1, 32, [10], [400])
    bias = torch.zeros(400, device=device)
    bias[:300] = -math.inf
    exact, _ = expected(q, k, v, cu_q, cu_k, bias, 0.2, torch.float64)
    same, _ = expected(q, k, v, cu_q, cu_k, bias, 0.2, torch.float32)
    out = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, scale=0.2, backend=backend)
    as_good(out, exact, same)


def test_sequences_do_not_touch(backend, device, rng):
    """NaN in one sample of a packed batch stays in that sample."""
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 2, 32, [20, 25, 7], [35, 15, 40])
    clean = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend)
    q[20:45], k[35:50], v[35:50] = math.nan, math.nan, math.nan
    dirty = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend)
    assert torch.equal(dirty[:20], clean[:20]) and torch.equal(dirty[45:], clean[45:])
    assert dirty[20:45].isnan().all()


def test_bias_is_the_area_of_a_key(backend, device, rng):
    """+log 4 on a key is the same as four copies of it; scale 0 and negative scales are legal."""
    q, k, v = (torch.randn(1, n, 2, 32, generator=rng).to(device) for n in (30, 20, 20))
    bias = torch.zeros(1, 20, device=device)
    bias[:, 5:] = math.log(4)
    repeats = torch.tensor([1] * 5 + [4] * 15, device=device)
    copies = [x.repeat_interleave(repeats, dim=1) for x in (k, v)]
    for scale in (None, 0.0, -0.5):
        got, lse = mixed_attention(q, k, v, key_bias=bias, scale=scale, return_lse=True, backend=backend)
        want, want_lse = mixed_attention(q, *copies, scale=scale, return_lse=True, backend=backend)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(lse, want_lse)


def test_lse_merges_two_halves(backend, device, rng):
    q, k, v = (torch.randn(2, n, 2, 32, generator=rng).to(device) for n in (30, 50, 50))
    whole = mixed_attention(q, k, v, backend=backend)
    parts = [mixed_attention(q, k[:, s], v[:, s], return_lse=True, backend=backend)
             for s in (slice(0, 13), slice(13, 50))]  # fmt: skip
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0).transpose(-1, -2).unsqueeze(-1)
    torch.testing.assert_close(weights[0] * parts[0][0] + weights[1] * parts[1][0], whole)


def test_large_logits(backend, device, rng, as_good):
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 1, 32, [20], [90])
    q *= 100
    exact, exact_lse = expected(q, k, v, cu_q, cu_k, None, 1.0, torch.float64)
    same, same_lse = expected(q, k, v, cu_q, cu_k, None, 1.0, torch.float32)
    out, lse = mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=1.0, return_lse=True,
                               backend=backend)  # fmt: skip
    as_good(out, exact, same)
    as_good(lse, exact_lse, same_lse)


def test_bad_input(backend, device):
    q = torch.zeros(6, 2, 16, device=device)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    both = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    dense = q[None]
    bias = torch.zeros(6, device=device)
    for call, error, text in [
        (lambda: mixed_attention(q, q, q, cu_seqlens_q=cu), ValueError, "both cu_seqlens_q and cu_seqlens_k"),
        (lambda: mixed_attention(q, q, q, cu_seqlens_k=cu), ValueError, "both cu_seqlens_q and cu_seqlens_k"),
        (
            lambda: mixed_attention(q, q, q),
            ValueError,
            r"q: expected 4 dim.* need cu_seqlens_q and cu_seqlens_k",
        ),
        (
            lambda: mixed_attention(dense, dense, dense, **both),
            ValueError,
            r"q: expected 3 dimensions \(T, H, D\)",
        ),
        (lambda: mixed_attention(q, q.half(), q, **both), TypeError, "k: expected dtype float32, got float16"),
        (lambda: mixed_attention(q.int(), q, q, **both), TypeError, "q: expected dtype"),
        (lambda: mixed_attention(q, q[:, :1], q, **both), ValueError, r"v: expected shape \(6, 1, 16\), got \(6, 2"),
        (
            lambda: mixed_attention(q, q[..., :8], q[..., :8], **both),
            ValueError,
            r"k: expected shape \(6, 2, 16\)",
        ),
        (lambda: mixed_attention(q, q, q[:5], **both), ValueError, r"v: expected shape \(6, 2, 16\)"),
        (lambda: mixed_attention(q, q.to("meta"), q, **both), ValueError, "k: expected device"),
        (lambda: mixed_attention(q, q, q, cu_seqlens_q=cu.long(), cu_seqlens_k=cu), TypeError, "expected dtype int32"),
        (lambda: mixed_attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu[:2]), ValueError, "cu_seqlens_k: expected"),
        (lambda: mixed_attention(q, q, q, **both, key_bias=bias[:5]), ValueError, r"key_bias: expected shape \(6,\)"),
        (lambda: mixed_attention(q, q, q, **both, key_bias=bias.half()), TypeError, "key_bias: expected dtype float32"),
        (lambda: mixed_attention(dense, dense, dense, key_bias=bias), ValueError, "key_bias: expected 2 dimensions"),
        (lambda: mixed_attention(q, q, q, **both, scale=math.nan), ValueError, "scale: expected a finite number"),
        (lambda: mixed_attention(q, q, q, **both, max_seqlen_q=4.0), TypeError, "max_seqlen_q: expected an int"),
        (lambda: mixed_attention(dense, dense, dense, max_seqlen_q=4), ValueError, "expected None without cu_seqlens"),
        (lambda: mixed_attention(q, q, q, **both, backend="flash"), ValueError, "backend: expected one of"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_heads_first_is_warned_about(backend, device):
    """(B, H, N, D) is read as N tokens for H heads, which fits as well."""
    q = torch.zeros(1, 4, 6, 16, device=device)
    with pytest.warns(UserWarning, match=r"q: expected \(B, N, H, D\), got shape \(1, 4, 6, 16\) with more heads"):
        mixed_attention(q, q, q, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed_attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2), backend=backend)
        mixed_attention(q[:, :1], q.transpose(1, 2)[:, :, :2], q.transpose(1, 2)[:, :, :2], backend=backend)


def test_gradients_are_computed_or_rejected(backend, device, rng):
    """Plain PyTorch gives them; a kernel must not lose them silently."""
    q = torch.randn(1, 5, 2, 16, generator=rng).to(device).requires_grad_()
    if backend == "triton":
        with pytest.raises(
            RuntimeError, match=r"mixed_attention: expected torch.no_grad\(\), got a tensor that requires"
        ):
            mixed_attention(q, q, q, backend=backend)
        with torch.no_grad():
            assert not mixed_attention(q, q, q, backend=backend).requires_grad
        return
    (got,) = torch.autograd.grad(mixed_attention(q, q, q, backend=backend).square().sum(), q)
    (want,) = torch.autograd.grad(softmax_attention(q[0], q[0], q[0], None, 0.25, torch.float32)[0].square().sum(), q)
    torch.testing.assert_close(got, want)


def test_bfloat16_is_refused_where_the_interpreter_gets_it_wrong(backend, device, monkeypatch):
    if backend != "triton" or device.type != "cpu":
        pytest.skip("needs Triton's interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "exact_bfloat16", False)  # as it comes, without tests/kernels/bfloat16.py
    q = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="q: expected float16 or float32 in Triton's interpreter, got bfloat16"):
        mixed_attention(q, q, q, backend=backend)


@pytest.mark.parametrize("ends", [[0, 2, 5], [0, 7, 6], [1, 2, 6], [0, 2, 7]], ids=str)
def test_bad_cu_seqlens(backend, device, monkeypatch, ends):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    q = torch.zeros(6, 2, 16, device=device)
    good = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    bad = torch.tensor(ends, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected offsets"):
        mixed_attention(q, q, q, cu_seqlens_q=bad, cu_seqlens_k=good, backend=backend)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected offsets"):
        mixed_attention(q, q, q, cu_seqlens_q=good, cu_seqlens_k=bad, backend=backend)
    with pytest.raises(ValueError, match=r"max_seqlen_q: expected at least the longest sequence \(4\), got 3"):
        mixed_attention(q, q, q, cu_seqlens_q=good, cu_seqlens_k=good, max_seqlen_q=3, backend=backend)


def test_plain_pytorch_checks_the_offsets_it_reads(monkeypatch, device):
    """On a GPU too, where nothing else reads them: pieces that do not cover the tensor would not fit together."""
    monkeypatch.setattr(checks, "values_are_checked", lambda tensor: False)
    q, cu = torch.zeros(6, 2, 16, device=device), torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected offsets from 0 to 6, got 0 to 5"):
        mixed_attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="torch")

"""qk_norm_rope against the chain of modules it replaces in diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from specedit_kernels import qk_norm_rope


def chain(x, weight, cos, sin, eps, dtype):
    """RMSNorm, then complex rotation; x (..., T, H, D), cos and sin (T, D/2) or (B, T, D/2), all in `dtype`."""
    y = x.to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    c, s = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    even, odd = y[..., 0::2], y[..., 1::2]
    return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)


def inputs(rng, device, dtype, lead, heads, dim):
    q, k, v = (torch.randn(*lead, heads, dim, generator=rng).to(device, dtype) for _ in range(3))
    q_weight, k_weight = (torch.rand(dim, generator=rng).add(0.5).to(device, dtype) for _ in range(2))
    angles = torch.rand(*lead, dim // 2, generator=rng).mul(6.3).to(device)
    return q, k, v, q_weight, k_weight, angles.cos(), angles.sin()


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 16), (33, 2, 128), (5, 1, 100), (0, 2, 64)], ids=str)
def test_packed(backend, dtype, device, rng, as_good, shape):
    tokens, heads, dim = shape
    q, k, v, qw, kw, cos, sin = inputs(rng, device, dtype, (tokens,), heads, dim)
    got = qk_norm_rope(q, k, qw, kw, cos, sin, v=v, backend=backend)
    assert (len(got) == 3 and torch.equal(got[2], v) and got[2].data_ptr() != v.data_ptr()) or tokens == 0
    for new, x, w in ((got[0], q, qw), (got[1], k, kw)):
        as_good(new, chain(x, w, cos, sin, 1e-6, torch.float64), chain(x, w, cos, sin, 1e-6, dtype))
    assert len(qk_norm_rope(q, k, qw, kw, cos, sin, backend=backend)) == 2


@pytest.mark.parametrize("batched_angles", [False, True])
def test_dense(backend, device, rng, as_good, batched_angles):
    q, k, v, qw, kw, cos, sin = inputs(rng, device, torch.float32, (2, 9), 2, 32)
    if not batched_angles:
        cos, sin = cos[0], sin[0]
    got = qk_norm_rope(q, k, qw, kw, cos, sin, eps=0.1, backend=backend)
    for new, x, w in zip(got, (q, k), (qw, kw)):
        as_good(new, chain(x, w, cos, sin, 0.1, torch.float64), chain(x, w, cos, sin, 0.1, torch.float32))


def test_joint_layout(backend, dtype, device, rng):
    """Text and image rows land in one packed tensor, in any order, and nothing else is written."""
    joint = [torch.full((12, 2, 32), 7.0, dtype=dtype, device=device) for _ in range(3)]
    seen = []
    for rows in ([0, 1, 2], [11, 4, 5, 9]):
        q, k, v, qw, kw, cos, sin = inputs(rng, device, dtype, (len(rows),), 2, 32)
        index = torch.tensor(rows, dtype=torch.int32, device=device)
        got = qk_norm_rope(q, k, qw, kw, cos, sin, v=v, out_index=index, out=joint, backend=backend)
        assert all(a is b for a, b in zip(got, joint))
        plain = qk_norm_rope(q, k, qw, kw, cos, sin, v=v, backend=backend)
        for new, want in zip(joint, plain):
            assert torch.equal(new[rows], want)
        seen += rows
    rest = [r for r in range(12) if r not in seen]
    assert all(bool((x[rest] == 7).all()) for x in joint)


def test_dense_joint_layout_and_strided_views(backend, device, rng):
    base = torch.randn(2, 5, 6, 64, generator=rng).to(device)
    q, k = base[:, :, ::2, :32], base[:, :, 1::2, 32:]
    weight = torch.rand(64, generator=rng).to(device)[::2]
    angles = torch.rand(16, 5, generator=rng).to(device).t()
    wide = torch.zeros(2, 9, 3, 80, device=device)
    out = wide[:, :, :, :32], wide[:, :, :, 40:72]
    index = torch.tensor([8, 0, 3, 2, 6], device=device)
    qk_norm_rope(q, k, weight, weight, angles.cos(), angles.sin(), out_index=index, out=out, backend=backend)
    want = qk_norm_rope(q.contiguous(), k.contiguous(), weight.contiguous(), weight.contiguous(),
                        angles.cos().contiguous(), angles.sin().contiguous(), backend="torch")  # fmt: skip
    for new, x in zip(out, want):
        torch.testing.assert_close(new[:, index], x)
    assert not wide[:, [1, 4, 5, 7]].any() and not wide[..., 72:].any()


def test_in_place(backend, device, rng):
    q, k, _, qw, kw, cos, sin = inputs(rng, device, torch.float32, (9,), 2, 32)
    want = qk_norm_rope(q, k, qw, kw, cos, sin, backend=backend)
    got = qk_norm_rope(q, k, qw, kw, cos, sin, out=(q, k), backend=backend)
    assert got[0] is q and torch.equal(q, want[0]) and torch.equal(k, want[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does it there")
def test_heads_far_apart(backend, rng):
    """Heads first, as (H, T, D) views have them: the third head lies behind the 2^31st element."""
    base = torch.from_numpy(np.zeros((2 << 30) + 4096, dtype=np.float16))  # memory that nobody touches costs nothing
    x = base.as_strided((5, 3, 16), (16, 1 << 30, 1))
    x.copy_(torch.randn(5, 3, 16, generator=rng))
    weight, angles = torch.ones(16), torch.rand(5, 8, generator=rng)
    want = qk_norm_rope(*[x.contiguous()] * 2, weight, weight, angles.cos(), angles.sin(), backend=backend)
    other = x.contiguous()
    got = qk_norm_rope(x, other, weight, weight, angles.cos(), angles.sin(), out=(x, other), backend=backend)
    assert torch.equal(got[0], want[0])


def test_matches_the_diffusers_chain(backend, device, rng):
    q, k, _, qw, kw, cos, sin = inputs(rng, device, torch.float32, (21,), 4, 64)
    norm = torch.nn.RMSNorm(64, eps=1e-6, device=device)
    norm.weight.data = qw
    repeated = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    want = apply_rotary_emb(norm(q)[None], repeated, sequence_dim=1)[0]
    torch.testing.assert_close(qk_norm_rope(q, k, qw, kw, cos, sin, backend=backend)[0], want.detach())


@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e-7, 1e-20, 1e-25, 1e-38, 3e-44, 1e25], ids=str)
def test_without_eps_any_magnitude_has_a_norm(backend, dtype, device, rng, as_good, magnitude):
    """In plain float32 squares of tiny values underflow (inf, NaN) and those of large ones overflow (0)."""
    if torch.tensor(magnitude).to(dtype) == 0 or torch.tensor(magnitude).to(dtype).isinf():
        pytest.skip("not a number of this dtype")
    q, k, _, qw, kw, cos, sin = inputs(rng, device, torch.float32, (9,), 2, 32)
    q, k = ((x * magnitude).to(dtype) for x in (q, k))
    q[0, 0, 1:] = 0
    q[0, 0, 0] = magnitude
    got = qk_norm_rope(q, k, qw.to(dtype), kw.to(dtype), cos, sin, eps=0.0, backend=backend)
    for new, x, w in zip(got, (q, k), (qw, kw)):
        exact = chain(x, w.to(dtype), cos, sin, 0.0, torch.float64)
        unit = x.double() / x.double().abs().amax(-1, keepdim=True)  # what PyTorch can do in this precision
        as_good(new, exact, chain(unit.to(dtype), w.to(dtype), cos, sin, 0.0, dtype))


def test_eps_of_zero_equals_pytorch(backend, device):
    """A row of zeros has no norm (NaN, as in PyTorch), with the smallest eps it is 0; infinite values are as there."""
    rows = torch.zeros(3, 1, 8, device=device)
    rows[1], rows[2] = 2.0, torch.tensor([math.inf, *[1.0] * 7])
    weight, cos = torch.ones(8, device=device), torch.ones(3, 4, device=device)
    for eps in (0.0, 1e-40, 1e-6):
        got = qk_norm_rope(rows, rows, weight, weight, cos, torch.zeros_like(cos), eps=eps, backend=backend)[0]
        want = torch.nn.functional.rms_norm(rows, (8,), weight, eps)
        assert torch.equal(got[:2, 0].isnan(), want[:2, 0].isnan()) and bool(got[2, 0, 0].isnan())
        torch.testing.assert_close(got[1], want[1])
        assert eps == 0 or not got[0].any()


def test_bad_input(backend, device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    q = torch.zeros(4, 2, 8, device=device)
    w, c = torch.ones(8, device=device), torch.ones(4, 4, device=device)
    index = torch.arange(4, device=device)
    for call, error, text in [
        (lambda: qk_norm_rope(q, q[:3], w, w, c, c), ValueError, r"k: expected shape \(4, 2, 8\), got \(3, 2, 8\)"),
        (lambda: qk_norm_rope(q, q.half(), w, w, c, c), TypeError, "k: expected dtype float32, got float16"),
        (lambda: qk_norm_rope(q[..., :7], q[..., :7], w, w, c, c), ValueError, "expected an even head dim, got 7"),
        (lambda: qk_norm_rope(q, q, w[:4], w, c, c), ValueError, r"q_weight: expected shape \(8,\), got \(4,\)"),
        (lambda: qk_norm_rope(q, q, w, w, c.half(), c), TypeError, "cos: expected dtype float32"),
        (lambda: qk_norm_rope(q, q, w, w, c, c[:3]), ValueError, r"sin: expected shape \(4, 4\), got \(3, 4\)"),
        (lambda: qk_norm_rope(q, q, w, w, c, c, eps=-1.0), ValueError, "eps: expected"),
        (lambda: qk_norm_rope(q, q, w, w, c, c, v=q[:3]), ValueError, "v: expected shape"),
        (lambda: qk_norm_rope(q, q, w, w, c, c, out_index=index), ValueError, "out: expected tensors to write into"),
        (lambda: qk_norm_rope(q, q, w, w, c, c, out=(q,)), ValueError, "expected 2 tensors"),
        (lambda: qk_norm_rope(q, q, w, w, c, c, out=(q[:3], q)), ValueError, r"out\[0\]: expected shape"),
        (
            lambda: qk_norm_rope(q, q, w, w, c, c, out=(q, q.clone()), out_index=index.float()),
            TypeError,
            "out_index: expected dtype int32, int64, got float32",
        ),
        (
            lambda: qk_norm_rope(q, q, w, w, c, c, out=(q, q.clone()), out_index=index + 1),
            ValueError,
            r"out_index: expected values in \[0, 4\), got values from 1 to 4",
        ),
        (lambda: qk_norm_rope(q, q, w, w, c, c, backend="cpu"), ValueError, "backend: expected one of"),
    ]:
        with pytest.raises(error, match=text):
            call()

"""The memory-bound kernels against PyTorch: rows, expand, norm and rotary.

    pytest benchmarks/test_tokens.py --results benchmarks/results/kernels_tokens.json

Without a GPU, the cases are smaller.
"""

import functools
import importlib.util

import pytest
import torch

import specedit_kernels as kernels
from benchmarks import peers
from benchmarks.kernel_harness import DEVICE, DTYPE, ON_GPU, TOLERANCE, measure
from specedit_kernels import reference

# rows gathered, channels: one latent grid, hidden states of one edit, of a batch
ROWS = {"latent tokens": (4096, 64), "hidden states": (4096, 3072), "hidden states, batch 8": (32768, 3072)}
TOKENS, HEADS, DIM = (8704, 24, 128) if ON_GPU else (256, 2, 64)
COARSE = {"one image": 1024, "batch of 64": 65536}
if not ON_GPU:
    ROWS = {name: (rows // 64, channels // 16) for name, (rows, channels) in ROWS.items()}
    COARSE = {name: count // 64 for name, count in COARSE.items()}


def randn(*shape, dtype=DTYPE):
    return torch.randn(shape, device=DEVICE).to(dtype)


def permutation(count):
    return torch.randperm(count, device=DEVICE)


GATHER = {
    "specedit_kernels": kernels.gather_tokens,
    "index_select": lambda x, index: x.index_select(0, index),
    "advanced indexing": lambda x, index: x[index],
}
SCATTER = {
    "specedit_kernels": kernels.scatter_tokens,
    "index_copy_": lambda src, index, out: out.index_copy_(0, index, src),
    "advanced indexing": lambda src, index, out: out.index_put_((index,), src),
}


@pytest.mark.parametrize("provider", GATHER)
@pytest.mark.parametrize("case", ROWS)
@torch.inference_mode()
def test_gather(benchmark, roofs, rows, case, provider):
    count, channels = ROWS[case]
    rows.append(measure(
        benchmark, {"op": "gather_tokens", "case": case, "provider": provider},
        lambda: (randn(2 * count, channels), permutation(2 * count)[:count]), GATHER[provider],
        lambda x, index: x[index].double(), roofs, size=2 * count * channels * DTYPE.itemsize, tolerance=0.0,
    ))  # fmt: skip


@pytest.mark.parametrize("provider", SCATTER)
@pytest.mark.parametrize("case", ROWS)
@torch.inference_mode()
def test_scatter(benchmark, roofs, rows, case, provider):
    count, channels = ROWS[case]

    def exact(src, index, out):
        want = out.double()
        want[index] = src.double()
        return want

    rows.append(measure(
        benchmark, {"op": "scatter_tokens", "case": case, "provider": provider},
        lambda: (randn(count, channels), permutation(2 * count)[:count], randn(2 * count, channels)),
        SCATTER[provider], exact, roofs, size=2 * count * channels * DTYPE.itemsize, tolerance=0.0,
    ))  # fmt: skip


@functools.cache
def compiled(function):
    return torch.compile(function)


def expand_eager(z, noise, detail):
    return reference.expand_tokens(z, 0.5, noise=noise, detail=detail)[0]


EXPAND = {
    "specedit_kernels": lambda z, noise, detail: kernels.expand_tokens(z, 0.5, noise=noise, detail=detail)[0],
    "eager chain": expand_eager,
}
if ON_GPU:
    EXPAND["torch.compile of the chain"] = lambda *x: compiled(expand_eager)(*x)


@pytest.mark.parametrize("provider", EXPAND)
@pytest.mark.parametrize("case", COARSE)
@torch.inference_mode()
def test_expand(benchmark, roofs, rows, case, provider):
    count = COARSE[case]
    read_and_written = count * 64 * (1 + 3 + 3 + 4) * DTYPE.itemsize
    rows.append(measure(
        benchmark, {"op": "expand_tokens", "case": case, "provider": provider},
        lambda: (randn(count, 64), randn(count, 4, 16, 3), randn(count, 4, 16, 3)), EXPAND[provider],
        lambda *x: expand_eager(*(t.double() for t in x)), roofs, size=read_and_written, tolerance=TOLERANCE,
    ))  # fmt: skip


def norm_rope_eager(q, k, weight, cos, sin):
    """The chain of diffusers' attention processors: RMSNorm in float32, then rotation by repeated angles."""
    from diffusers.models.embeddings import apply_rotary_emb

    repeated = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    normed = (torch.nn.functional.rms_norm(x, (DIM,), weight, 1e-6) for x in (q, k))
    return torch.cat([apply_rotary_emb(x[None], repeated, sequence_dim=1)[0] for x in normed])


def norm_rope_ours(q, k, weight, cos, sin):
    joint = torch.empty((2 * TOKENS, HEADS, DIM), dtype=q.dtype, device=q.device)
    kernels.qk_norm_rope(q, k, weight, weight, cos, sin, out=(joint[:TOKENS], joint[TOKENS:]))
    return joint


NORM_ROPE = {
    "specedit_kernels": norm_rope_ours,
    "eager chain": norm_rope_eager,
    "FlashInfer rmsnorm and rope": peers.flashinfer_norm_rope,
}
if ON_GPU:
    NORM_ROPE["torch.compile of the chain"] = lambda *x: compiled(norm_rope_eager)(*x)


@pytest.mark.parametrize("provider", NORM_ROPE)
@torch.inference_mode()
def test_qk_norm_rope(benchmark, roofs, rows, provider):
    if "chain" in provider and importlib.util.find_spec("diffusers") is None:
        pytest.skip("the chain is diffusers'")

    def inputs():
        angles = torch.rand(TOKENS, DIM // 2, device=DEVICE) * 6.3
        return randn(TOKENS, HEADS, DIM), randn(TOKENS, HEADS, DIM), randn(DIM), angles.cos(), angles.sin()

    def exact(q, k, weight, cos, sin):
        return torch.cat(reference.qk_norm_rope(*(x.double() for x in (q, k, weight, weight, cos, sin))))

    size = 4 * TOKENS * HEADS * DIM * DTYPE.itemsize + TOKENS * DIM * 4
    rows.append(measure(
        benchmark, {"op": "qk_norm_rope", "case": f"{TOKENS} tokens", "provider": provider}, inputs,
        NORM_ROPE[provider], exact, roofs, size=size, tolerance=TOLERANCE,
    ))  # fmt: skip

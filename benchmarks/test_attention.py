"""mixed_attention against other implementations (some without a bias), at the token counts of an edit.

    pytest benchmarks/test_attention.py --results benchmarks/results/kernels_attention.json

Without a GPU, the cases are smaller.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.kernel_harness import DEVICE, DTYPE, ON_GPU, TOLERANCE, measure
from specedit_kernels import mixed_attention

HEADS, DIM = (24, 128) if ON_GPU else (2, 64)
TEXT, CELLS = (512, 1024) if ON_GPU else (32, 64)


def mixed(edited, text=TEXT):
    """Coarse and fine keys of a 1024 px edit: `edited` of the cells of target and reference are four tokens."""
    fine = 4 * round(CELLS * edited)
    return 2 * (CELLS - fine // 4), text + 2 * fine


# Qwen-Image-Edit: FLUX's heads and head dim; guidance is two sequences in one launch, with prompts of different length.
PROMPTS = (1280, 1216) if ON_GPU else (40, 24)

CASES = {  # per sequence: keys that cover four positions, keys that cover one
    "draft": [(0, TEXT + CELLS // 2)],
    "coarse": [(0, TEXT + 2 * CELLS)],
    "mixed 10%": [mixed(0.1)],
    "mixed 20%": [mixed(0.2)],
    "mixed 40%": [mixed(0.4)],
    "full": [(0, TEXT + 8 * CELLS)],
    "Qwen CFG draft": [(0, text + CELLS // 2) for text in PROMPTS],
    "Qwen CFG coarse": [(0, text + 2 * CELLS) for text in PROMPTS],
    "Qwen CFG mixed 10%": [mixed(0.1, text) for text in PROMPTS],
    "Qwen CFG mixed 20%": [mixed(0.2, text) for text in PROMPTS],
    "Qwen CFG mixed 40%": [mixed(0.4, text) for text in PROMPTS],
    "Qwen CFG full": [(0, text + 8 * CELLS) for text in PROMPTS],
    "batch of 8 masks": [mixed(0.05 * (i + 1)) for i in range(8)],
}


def make_inputs(lengths):
    counts = [a + b for a, b in lengths]
    q, k, v = (torch.randn(sum(counts), HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(3))
    bias = torch.cat([torch.tensor([math.log(4)] * a + [0.0] * b) for a, b in lengths]).to(DEVICE)
    return q, k, v, torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32), bias


def per_sequence(attend):
    """Make a packed provider from one for dense sequences (1, H, N, D) without varlen support."""

    def run(q, k, v, cu, bias, lengths):
        outs, at = [], 0
        for a, b in lengths:
            rows = slice(at, at + a + b)
            q1, k1, v1 = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
            outs.append(attend(q1, k1, v1, bias[rows], a)[0].transpose(0, 1))
            at += a + b
        return torch.cat(outs)

    return run


def ours(q, k, v, cu, bias, lengths):
    return mixed_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(map(sum, lengths)),
                           key_bias=bias)  # fmt: skip


def ours_no_bias(q, k, v, cu, bias, lengths):
    return mixed_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(map(sum, lengths)))


def ours_dense(q, k, v, cu, bias, lengths):
    """One sequence as a dense batch."""
    if len(lengths) > 1:
        pytest.skip("sequences of several lengths are no dense batch")
    return mixed_attention(q[None], k[None], v[None], key_bias=bias[None])[0]


def sdpa_with(backend):
    @per_sequence
    def run(q, k, v, bias, coarse):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


@per_sequence
def sdpa_mask(q, k, v, bias, coarse):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None, None, None])


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@per_sequence
def flex(q, k, v, bias, coarse):
    return _compiled_flex()(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[j])


@per_sequence
def two_passes(q, k, v, bias, coarse):
    """Exact without a bias in the kernel: one pass per area, merged by lse + log(area)."""
    parts = []
    for keys, area in ((slice(0, coarse), 4), (slice(coarse, None), 1)):
        if k[:, :, keys].shape[2]:
            if ON_GPU:
                out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k[:, :, keys], v[:, :, keys])
            else:
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k[:, :, keys], v[:, :, keys])
            parts.append((out, lse + math.log(area)))
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
    return sum(w.unsqueeze(-1).to(out.dtype) * out for w, (out, _) in zip(weights, parts))


# provider -> (function, whether it takes the bias)
PROVIDERS = {
    "specedit_kernels": (ours, True),
    "specedit_kernels without bias": (ours_no_bias, False),
    "specedit_kernels dense": (ours_dense, True),
    "SDPA broadcast mask": (sdpa_mask, True),
    "flash, two passes merged by lse": (two_passes, True),
    "flash-attn varlen without bias": (peers.flash_attn_varlen, False),
    "FlashAttention-4 score_mod": (peers.flash_attn_4, True),
}
if ON_GPU:
    PROVIDERS |= {
        "SDPA cuDNN without bias": (sdpa_with(SDPBackend.CUDNN_ATTENTION), False),
        "SDPA flash without bias": (sdpa_with(SDPBackend.FLASH_ATTENTION), False),
        "SDPA efficient without bias": (sdpa_with(SDPBackend.EFFICIENT_ATTENTION), False),
        "FlexAttention with bias": (flex, True),
    }
else:
    PROVIDERS["SDPA without bias"] = (sdpa_with(SDPBackend.FLASH_ATTENTION), False)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_attention(benchmark, roofs, rows, case, provider):
    lengths = CASES[case]
    run, with_bias = PROVIDERS[provider]

    def exact(q, k, v, cu, bias):
        """Head by head in float64, so that the logits fit in memory."""
        outs, at = [], 0
        for a, b in lengths:
            rows_ = slice(at, at + a + b)
            at += a + b
            heads = []
            for h in range(HEADS):
                q1, k1, v1 = (x[rows_, h].double() for x in (q, k, v))
                logits = q1 @ k1.T * DIM**-0.5 + (bias[rows_].double() if with_bias else 0)
                heads.append(torch.softmax(logits, dim=-1) @ v1)
            outs.append(torch.stack(heads, dim=1))
        return torch.cat(outs)

    flops = sum(4 * (a + b) ** 2 * HEADS * DIM for a, b in lengths)
    row = {"op": "mixed_attention", "case": case, "provider": provider}
    rows.append(measure(
        benchmark, row, lambda: make_inputs(lengths), lambda *x: run(*x, lengths), exact, roofs, flops=flops,
        tolerance=TOLERANCE,
    ))  # fmt: skip

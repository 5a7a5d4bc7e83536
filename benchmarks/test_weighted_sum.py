"""A forecast from stacked differences against PyTorch.

    pytest benchmarks/test_weighted_sum.py --results benchmarks/results/kernels_weighted_sum.json

Without a GPU, the cases are smaller.
"""

import functools

import pytest
import torch

import specedit_kernels as kernels
from benchmarks.kernel_harness import DEVICE, DTYPE, ON_GPU, TOLERANCE, measure

# layers, tokens, channels: one 1024 px velocity at orders 2 and 4, hidden states, those of a batch
CASES = {
    "velocity, K=3": (3, 4096, 64), "velocity, K=5": (5, 4096, 64), "hidden states, K=3": (3, 4096, 3072),
    "hidden states, batch 8, K=3": (3, 32768, 3072),
}  # fmt: skip
if not ON_GPU:
    CASES = {name: (k, tokens // 64, channels // 16) for name, (k, tokens, channels) in CASES.items()}


def chain(stack, weights):
    """As in public forecasters: one term after the other."""
    y = torch.zeros_like(stack[0])
    for k in range(len(stack)):
        y = y + weights[k].to(stack.dtype) * stack[k]
    return y


@functools.cache
def compiled():
    return torch.compile(chain)


PROVIDERS = {
    "specedit_kernels": kernels.weighted_sum,
    "eager chain": chain,
    "tensordot": lambda stack, weights: torch.tensordot(weights.to(stack.dtype), stack, 1),
}
if ON_GPU:
    PROVIDERS["torch.compile of the chain"] = lambda *x: compiled()(*x)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_weighted_sum(benchmark, roofs, rows, case, provider):
    layers, tokens, channels = CASES[case]
    rows.append(measure(
        benchmark, {"op": "weighted_sum", "case": case, "provider": provider},
        lambda: (torch.randn(layers, tokens, channels, device=DEVICE).to(DTYPE), torch.randn(layers, device=DEVICE)),
        PROVIDERS[provider], lambda stack, weights: torch.tensordot(weights.double(), stack.double(), 1), roofs,
        size=(layers + 1) * tokens * channels * DTYPE.itemsize, tolerance=TOLERANCE,
    ))  # fmt: skip

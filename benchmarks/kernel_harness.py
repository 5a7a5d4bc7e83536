"""Measure kernels: correctness, then time with a cold cache, then the share of the roofline."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from specedit_kernels import timing

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-5  # bfloat16 on a GPU, float32 on a CPU
REPEATS = 30 if ON_GPU else 3
# Inputs rotate through at least this many bytes, more than any L2, so that caches are cold.
ROTATED_BYTES = 256 << 20 if ON_GPU else 8 << 20


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def device_milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of one call on the device (by events; by the clock on a CPU)."""
    return timing.milliseconds(call, torch.device(DEVICE), repeats)


def rooflines() -> dict[str, float]:
    """Rates that this machine reaches: GB/s of a large copy (read and written) and TFLOP/s of a large matmul."""
    size = 1 << 28 if ON_GPU else 1 << 24
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = device_milliseconds(lambda: target.copy_(source))
    n = 8192 if ON_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
    product = device_milliseconds(lambda: a @ b)
    return {"gbps": 2 * size / copy / 1e6, "tflops": 2 * n**3 / product / 1e9}


def measure(
    benchmark, row: dict, inputs: Callable[[], tuple], provider: Callable, exact: Callable, roofs: dict,
    *, flops: float | None = None, size: float | None = None, tolerance: float,
) -> dict:  # fmt: skip
    """Measure one provider on one case, and return its row of the result file.

    Args:
        inputs: makes a fresh set of inputs; called until they fill ROTATED_BYTES.
        provider, exact: both take the inputs; `exact` returns the result in float64.
        flops, size: the work of one call in operations or bytes; the one given is compared with its roofline.
        tolerance: maximum error, relative to the largest exact value. A provider beyond it is not timed.
    """
    first = inputs()
    want = exact(*first)
    try:
        got = provider(*first).to(want.device, torch.float64)
    except Exception as failure:
        if row["provider"].startswith("specedit_kernels"):
            raise
        # A peer that does not run on this machine is skipped, with the reason.
        pytest.skip(f"{row['provider']} does not run here: {type(failure).__name__}: {str(failure).splitlines()[0]}")
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= tolerance:
        pytest.fail(f"{row['op']} {row['case']} {row['provider']}: error {error:.2e} > {tolerance:.2e}, not timed")
    per_set = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    sets = [first, *(inputs() for _ in range(min(15, ROTATED_BYTES // max(1, per_set))))]
    turn = itertools.cycle(sets)

    def call():
        return provider(*next(turn))

    def wall():
        call()
        synchronize()

    milliseconds = device_milliseconds(call)
    benchmark.group = f"{row['op']} {row['case']}"
    benchmark.pedantic(wall, rounds=REPEATS, warmup_rounds=1)
    unit, work = ("tflops", flops / 1e12) if flops is not None else ("gbps", size / 1e9)
    rate = work / (milliseconds / 1e3)
    row = {**row, "ms": milliseconds, unit: rate, "of_roofline": rate / roofs[unit], "error": error}
    benchmark.extra_info.update(row)
    return row

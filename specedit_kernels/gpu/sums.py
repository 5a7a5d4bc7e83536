"""A weighted sum over stacked differences, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import launch
from .prepared import Launch


@triton.jit(do_not_specialize_on_alignment=["weights"])
def weighted_sum(stack, weights, out, elements, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum_k w_k x_k, in float32 and rounded once. One program computes BLOCK elements from ROWS layers."""
    layer = tl.zeros((), tl.int64) + elements  # between two layers, 64-bit
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [B]
    inside = at < elements
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(ROWS):
        row = tl.load(stack + k * layer + at, mask=inside, other=0).to(tl.float32)  # [B]
        total += tl.load(weights + k) * row
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def prepare_weighted_sum(
    stack: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None = None,
    tuned: dict[str, launch.Config] | None = None,
) -> Callable[..., torch.Tensor]:
    """What launches the kernel on tensors like these."""
    launch.check_dtype("stack", stack)
    rows, *shape = stack.shape
    elements = math.prod(shape)
    config = launch.config("weighted_sum", stack.device, tuned, rows=rows)
    if config is None:  # the file of launch parameters is older than this kernel
        config = {"block": 1024, "num_warps": 4}
    start = Launch(weighted_sum, (launch.ceil_div(elements, config["block"]), 1, 1), num_warps=config["num_warps"])
    fixed = elements, rows, config["block"]

    def call(stack: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = stack.new_empty(shape)
        if elements:
            start(stack.contiguous(), weights.contiguous(), out, *fixed)
        return out

    return call

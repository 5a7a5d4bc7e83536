"""A weighted sum over stacked differences, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


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


def launch_weighted_sum(
    stack: torch.Tensor, weights: torch.Tensor, tuned: dict[str, launch.Config] | None = None
) -> torch.Tensor:
    launch.check_dtype("stack", stack)
    stack = stack.contiguous()
    out = torch.empty(stack.shape[1:], dtype=stack.dtype, device=stack.device)
    if out.numel() == 0:
        return out
    config = launch.config("weighted_sum", stack.device, tuned, rows=stack.shape[0])
    if config is None:  # the file of launch parameters is older than this kernel
        config = {"block": 1024, "num_warps": 4}
    grid = (launch.ceil_div(out.numel(), config["block"]),)
    weighted_sum[grid](
        stack, weights.contiguous(), out, out.numel(), ROWS=stack.shape[0], BLOCK=config["block"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return out

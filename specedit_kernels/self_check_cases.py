"""The calls of `self_check`: every operator, and attention on the paths that an edit takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .block_keep import BLOCK_UNIT, BlockKeep
from .ops import PINGPONG

ATTENTION, MERGED = "mixed_attention", "merged"
QUERIES, KEYS, HEADS = 70, 150, 2  # neither fills its last tile
# Outputs among an operator's arguments.
_WRITTEN = {"scatter_tokens": (2,), "qk_norm_rope": (9, 10, 11)}


@dataclass(frozen=True)
class Case:
    """One call of an operator on a backend, "triton", "pingpong" or "merged"."""

    backend: str
    operator: str
    label: str
    args: tuple[Any, ...]

    @property
    def kernel(self) -> str:
        """What a finding is about: the operator, or a kind of attention that another stands in for."""
        return self.operator if self.backend == "triton" else self.backend

    @property
    def written(self) -> tuple[int, ...]:
        """The arguments that are outputs."""
        return _WRITTEN.get(self.operator, ())


def cases(device: torch.device, half: torch.dtype) -> Iterator[Case]:
    """Every call that needs no plan, with inputs of fixed numbers on the device."""
    yield from _attention(device, half)
    for dtype in (half, torch.float32):
        yield from _tokens(device, dtype)
        yield from _norm_rope(device, dtype)
        yield from _expansion(device, dtype)


def _draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng, dtype=torch.float32).to(device, dtype) for shape in shapes]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(device: torch.device, half: torch.dtype) -> Iterator[Case]:
    log4 = math.log(4)
    bias = torch.tensor([log4, 0.0, 0.0, log4, 0.0], device=device).repeat(KEYS // 5)
    cu_q, cu_k = (torch.tensor([0, 30, n], dtype=torch.int32, device=device) for n in (QUERIES, KEYS))
    keep = BlockKeep.from_mask(
        torch.tensor([[True, False, True]] * 2, device=device), query_block=BLOCK_UNIT, key_block=BLOCK_UNIT
    )
    lists = (keep.offsets, keep.blocks, BLOCK_UNIT, BLOCK_UNIT)
    for dtype, dim in ((half, 128), (half, 64), (torch.float32, 64)):
        q, k, v = _draw(device, dtype, (1, QUERIES, HEADS, dim), *[(1, KEYS, HEADS, dim)] * 2)
        scale, label = dim**-0.5, f"{_name(dtype)}, D={dim}"
        dense = (q, k, v, None, None, None, bias[None], scale, True)
        packed = (q[0], k[0], v[0], cu_q, cu_k, None, bias, scale, True)
        yield Case("triton", ATTENTION, f"{label}, dense", dense)
        yield Case(MERGED, ATTENTION, f"{label}, dense", dense)
        if dtype == half and dim == 128:
            yield Case("triton", ATTENTION, f"{label}, no bias", (q, k, v, None, None, None, None, scale, False))
            yield Case("triton", ATTENTION, f"{label}, packed", packed)
            yield Case("triton", ATTENTION, f"{label}, lists of blocks", (*dense, *lists))
            yield Case(MERGED, ATTENTION, f"{label}, packed", packed)


def planned_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Attention with a plan, which kernels make, for a bias that one block of keys shares and the others do not."""
    from . import gpu

    bias = torch.zeros(1, KEYS, device=device)
    bias[:, :128] = math.log(4)
    bias[:, 130::2] = math.log(4)
    for dim in (128, 64):
        q, k, v = _draw(device, dtype, (1, QUERIES, HEADS, dim), *[(1, KEYS, HEADS, dim)] * 2)
        made = gpu.plan(None, None, bias, QUERIES, KEYS, None, dim, dtype)
        args = (q, k, v, None, None, None, bias, dim**-0.5, True, None, None, 0, 0, *made)
        yield Case("triton", ATTENTION, f"{_name(dtype)}, D={dim}, planned", args)


def pingpong_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Attention at the sizes for which the device's launch parameters name the ping-pong kernel; mostly none."""
    from . import gpu

    for dim, length in gpu.pingpong_shapes(device):
        keys, scale = max(3, length - 7), dim**-0.5  # the last block is partial
        bias = torch.zeros(3 * keys, device=device)
        bias[::3], bias[1::7] = math.log(4), -math.inf
        q, k, v = _draw(device, dtype, (3, QUERIES, HEADS, dim), *[(3, keys, 1, dim)] * 2)
        rows = [x.flatten(0, 1).clone() for x in (q, k, v)]
        # Two keys, then two that belong to no query and must not be seen, then all others.
        ends_q, ends_k = (0, 30, 30, 3 * QUERIES), (0, 2, 4, 3 * keys)
        cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (ends_q, ends_k))
        rows[1][2:4], rows[2][2:4] = math.nan, math.nan
        runs = bias.view(3, keys).clone()
        runs[:, : keys // 2] = math.log(4)
        plan = gpu.plan(None, None, runs, QUERIES, keys, None, dim, dtype, True)
        calls = {
            "dense": (q, k, v, None, None, None, bias.view(3, keys), scale, True),
            "planned": (q, k, v, None, None, None, runs, scale, True, None, None, 0, 0, *plan),
            "no bias": (q, k, v, None, None, None, None, scale, False),
            "packed": (*rows, cu_q, cu_k, None, bias, scale, True),
        }
        for label, args in calls.items():
            yield Case(PINGPONG, ATTENTION, f"{_name(dtype)}, D={dim}, {keys} keys, {label}", args)


def split_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Attention whose last round of programs is split, where the device's launch parameters say so; mostly none."""
    from . import gpu

    for dim, keys, queries in gpu.split_shapes(device):
        q, k, v = _draw(device, dtype, (1, queries, 1, dim), *[(1, keys, 1, dim)] * 2)
        bias = torch.zeros(1, keys, device=device)
        bias[:, : keys // 2], bias[:, 1::7] = math.log(4), -math.inf
        scale = dim**-0.5
        plan = gpu.plan(None, None, bias, queries, keys, None, dim, dtype)
        args = (q, k, v, None, None, None, bias, scale, True)
        label = f"{_name(dtype)}, D={dim}, {keys} keys, split"
        yield Case("triton", ATTENTION, label, args)
        yield Case("triton", ATTENTION, f"{label}, planned", (*args, None, None, 0, 0, *plan))


def _tokens(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    x, source, out = _draw(device, dtype, (2, 50, 64), (2, 20, 64), (2, 50, 64))
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20].to(device)
    yield Case("triton", "gather_tokens", _name(dtype), (x, index))
    yield Case("triton", "scatter_tokens", _name(dtype), (source, index, out))
    (stack,) = _draw(device, dtype, (3, 2, 50, 64))
    weights = torch.tensor([1.0, -0.5, 0.125], device=device)
    yield Case("triton", "weighted_sum", _name(dtype), (stack, weights))


def _norm_rope(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows = (1, QUERIES, HEADS, 128)
    q, k, v, q_weight, k_weight = _draw(device, dtype, rows, rows, rows, (128,), (128,))
    (angles,) = _draw(device, torch.float32, (QUERIES, 64))
    place = torch.arange(QUERIES, device=device) + 9
    out = [torch.zeros(1, QUERIES + 9, HEADS, 128, dtype=dtype, device=device) for _ in range(3)]
    args = (q, k, v, q_weight, k_weight, angles.cos(), angles.sin(), 1e-6, place, *out)
    yield Case("triton", "qk_norm_rope", _name(dtype), args)


def _expansion(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    coarse, fine = _draw(device, dtype, (2, 30, 64), (2, 30, 4, 64))
    noise, detail = _draw(device, torch.float32, *[(2, 30, 4, 16, 3)] * 2)
    seed = torch.tensor([7, 8], device=device)
    yield Case("triton", "expand_tokens", _name(dtype), (coarse, 0.5, noise, None, detail, 2))
    yield Case("triton", "expand_tokens", f"{_name(dtype)}, drawn noise", (coarse, 0.5, None, seed, None, 2))
    yield Case("triton", "contract_tokens", _name(dtype), (fine, 0.5, 2))


def attention_in_own_precision(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None,
    longest: int | None, bias: torch.Tensor | None, scale: float, return_lse: bool, *lists: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax attention written out in the dtype of the inputs, without float32 inside. Lists as those of `cases`."""
    if cu_q is not None and cu_k is not None:
        parts = []
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
            row = None if bias is None else bias[None, c:d]
            one = (q[None, a:b], k[None, c:d], v[None, c:d])
            parts.append(attention_in_own_precision(*one, None, None, None, row, scale, True))
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) * scale
    if bias is not None:
        logits = logits + bias[:, None, None].to(q.dtype)
    if lists and lists[0] is not None:
        logits[..., BLOCK_UNIT : 2 * BLOCK_UNIT] = -math.inf
    lse = logits.logsumexp(-1)
    out = ((logits - lse.unsqueeze(-1)).exp() @ v).transpose(1, 2)
    return out, lse if return_lse else lse.new_empty(0)

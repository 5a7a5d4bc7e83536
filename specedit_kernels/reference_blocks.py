"""Attention over lists of key blocks in plain PyTorch: only the keys that a query block keeps are read.

Query blocks with equal lists run together, so lists that keep everything are one dense call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .reference import _attention

Rows = list[tuple[int, ...]]  # the key blocks of each query block
Lists = list[list[Rows]]  # of each head of each sample; what they share is there once
Result = tuple[torch.Tensor, torch.Tensor | None]


def _take(x: torch.Tensor, blocks: Iterable[int], size: int) -> torch.Tensor:
    """The tokens of ascending blocks along axis 1; the last block of a sequence may be shorter. One run is a view."""
    runs: list[list[int]] = []  # first block, and the one behind the last
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, block + 1])
    parts = [x[:, first * size : stop * size] for first, stop in runs] or [x[:, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Options(NamedTuple):
    scale: float
    return_lse: bool
    query_block: int
    key_block: int


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, rows: Rows, options: _Options
) -> Result:
    """All samples and heads of q (B, N, H, D) with the same lists."""
    together: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(row, []).append(number)
    outs: dict[int, torch.Tensor] = {}
    lses: dict[int, torch.Tensor] = {}
    for row, numbers in together.items():
        kept = None if bias is None else _take(bias, row, options.key_block)
        keys, values = (_take(x, row, options.key_block) for x in (k, v))
        queries = _take(q, numbers, options.query_block)
        out, lse = _attention(queries, keys, values, kept, options.scale, options.return_lse)
        if len(together) == 1:
            return out, lse
        outs |= zip(numbers, out.split(options.query_block, dim=1))
        if lse is not None:
            lses |= zip(numbers, lse.split(options.query_block, dim=2))
    if not together:  # no queries
        return _attention(q, k, v, bias, options.scale, options.return_lse)
    lse = torch.cat([lses[i] for i in range(len(rows))], dim=2) if options.return_lse else None
    return torch.cat([outs[i] for i in range(len(rows))], dim=1), lse


def _attend_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, heads: list[Rows], options: _Options
) -> Result:
    """All samples of q (B, N, H, D) with lists for every head, or for all of them."""
    if all(rows == heads[0] for rows in heads):
        return _attend_rows(q, k, v, bias, heads[0], options)
    group = q.shape[2] // k.shape[2]
    # A head's keys are contiguous, because every query block copies some of them.
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    parts = []
    for h, rows in enumerate(heads):
        shared = slice(h // group, h // group + 1)
        parts.append(_attend_rows(q[:, :, h : h + 1], k[:, :, shared], v[:, :, shared], bias, rows, options))
    return _join(parts, out_dim=2, lse_dim=1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, lists: Lists, options: _Options
) -> Result:
    """q (B, N, H, D) with lists for every sample or for all of them."""
    if all(heads == lists[0] for heads in lists):
        return _attend_heads(q, k, v, bias, lists[0], options)
    parts = []
    for b, heads in enumerate(lists):
        own = slice(b, b + 1)
        parts.append(_attend_heads(q[own], k[own], v[own], None if bias is None else bias[own], heads, options))
    return _join(parts, out_dim=0, lse_dim=0)


def _join(parts: list[Result], out_dim: int, lse_dim: int) -> Result:
    lses = [lse for _, lse in parts if lse is not None]
    complete = len(lses) == len(parts)  # without return_lse, some parts may have one
    return torch.cat([out for out, _ in parts], dim=out_dim), torch.cat(lses, dim=lse_dim) if complete else None


def _read_lists(offsets: torch.Tensor, blocks: torch.Tensor) -> Lists:
    numbers = blocks.tolist()
    samples = offsets.reshape((1,) * (3 - offsets.dim()) + tuple(offsets.shape)).tolist()
    return [[[tuple(numbers[a:b]) for a, b in itertools.pairwise(ends)] for ends in heads] for heads in samples]


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    blocks: torch.Tensor,
    sizes: tuple[int, int],
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`reference.mixed_attention` over the key blocks of a `BlockKeep`; sizes are (query_block, key_block)."""
    lists, options = _read_lists(offsets, blocks), _Options(scale, return_lse, *sizes)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _attend(q, k, v, key_bias, lists, options)
        return (out.contiguous(), lse.contiguous()) if return_lse and lse is not None else out.contiguous()
    parts, first = [], 0
    for (a, b), (c, d) in zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist())):
        rows = slice(first, first + -(-(b - a) // sizes[0]))
        first = rows.stop
        own = [[head[rows] for head in heads] for heads in lists]
        bias = None if key_bias is None else key_bias[None, c:d]
        parts.append(_attend(q[None, a:b], k[None, c:d], v[None, c:d], bias, own, options))
    out, lse = _join(parts, out_dim=1, lse_dim=2)
    return (out[0], lse[0]) if return_lse and lse is not None else out[0]

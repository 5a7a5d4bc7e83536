"""Attention over lists of key blocks in plain PyTorch: only the keys that a query block keeps are read.

Query blocks with equal lists run together, so lists that keep everything are one dense call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from .reference import _attention

Rows = list[tuple[int, ...]]  # the key blocks of each query block
Result = tuple[torch.Tensor, torch.Tensor | None]


def _tokens(blocks: Iterable[int], size: int, total: int, device: torch.device) -> torch.Tensor:
    """Numbers of the tokens of these blocks; the last block of a sequence ends at `total`."""
    found = [n for block in blocks for n in range(block * size, min((block + 1) * size, total))]
    return torch.tensor(found, dtype=torch.int64, device=device)


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, return_lse: bool,
    rows: Rows, sizes: tuple[int, int],
) -> Result:  # fmt: skip
    """All samples and heads of q (B, N, H, D) with the same lists."""
    together: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(row, []).append(number)
    everything = tuple(range(-(-k.shape[1] // sizes[1])))
    outs, lses, order = [], [], []
    for row, numbers in together.items():
        asking = _tokens(numbers, sizes[0], q.shape[1], q.device)
        q1 = q if len(together) == 1 else q.index_select(1, asking)
        k1, v1, bias1 = k, v, bias
        if row != everything:
            read = _tokens(row, sizes[1], k.shape[1], q.device)
            k1, v1 = k.index_select(1, read), v.index_select(1, read)
            bias1 = None if bias is None else bias.index_select(1, read)
        out, lse = _attention(q1, k1, v1, bias1, scale, return_lse)
        if len(together) == 1:
            return out, lse
        outs.append(out)
        order.append(asking)
        if lse is not None:
            lses.append(lse)
    if not together:  # no queries
        return _attention(q, k, v, bias, scale, return_lse)
    back = torch.cat(order).argsort()
    lse = torch.cat(lses, dim=2).index_select(2, back) if return_lse else None
    return torch.cat(outs, dim=1).index_select(1, back), lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, return_lse: bool,
    lists: list[list[Rows]], sizes: tuple[int, int],
) -> Result:  # fmt: skip
    """q (B, N, H, D) with `lists` for every sample or one for all, and for every head or one for all."""
    alike = all(rows == lists[0][0] for heads in lists for rows in heads)
    if alike:
        return _attend_rows(q, k, v, bias, scale, return_lse, lists[0][0], sizes)
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for b, heads in enumerate(lists):
        sample = slice(b, b + 1) if len(lists) > 1 else slice(None)
        bias1 = None if bias is None else bias[sample]
        if all(rows == heads[0] for rows in heads):
            parts = [_attend_rows(q[sample], k[sample], v[sample], bias1, scale, return_lse, heads[0], sizes)]
        else:
            parts = [
                _attend_rows(
                    q[sample, :, h : h + 1], *(x[sample, :, h // group : h // group + 1] for x in (k, v)), bias1, scale,
                    return_lse, rows, sizes,
                )
                for h, rows in enumerate(heads)
            ]  # fmt: skip
        outs.append(torch.cat([out for out, _ in parts], dim=2))
        lses.append(torch.cat([lse for _, lse in parts if lse is not None], dim=1) if return_lse else None)
    return torch.cat(outs), torch.cat([lse for lse in lses if lse is not None]) if return_lse else None


def _read_lists(offsets: torch.Tensor, blocks: torch.Tensor) -> list[list[Rows]]:
    """The lists [sample][head][row]; what the samples or heads share is there once."""
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
    lists = _read_lists(offsets, blocks)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _attend(q, k, v, key_bias, scale, return_lse, lists, sizes)
        return (out.contiguous(), lse.contiguous()) if lse is not None and return_lse else out.contiguous()
    parts, first = [], 0
    ends = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()))
    for (a, b), (c, d) in ends:
        rows = slice(first, first + -(-(b - a) // sizes[0]))
        first = rows.stop
        bias = None if key_bias is None else key_bias[None, c:d]
        own = [[head[rows] for head in heads] for heads in lists]
        parts.append(_attend(q[None, a:b], k[None, c:d], v[None, c:d], bias, scale, return_lse, own, sizes))
    out = torch.cat([part[0] for part, _ in parts])
    return (out, torch.cat([lse[0] for _, lse in parts if lse is not None], dim=1)) if return_lse else out

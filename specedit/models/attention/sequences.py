"""Rows of joint and packed sequences: where each row lies, which rows are queries, and which are coarse."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from specedit_kernels import AttentionPlan, KeyGroups

Tables = tuple[Tensor, Tensor]  # cos and sin
Pair = tuple[Tensor, Tensor]  # keys and values


class Movable:
    """A frozen dataclass of tensors with `to`, which accelerate's hooks call on every argument."""

    def to(self, device: torch.device | str | int, **how: Any) -> Self:
        """A copy with every tensor moved, or itself where all are there already; caches are not copied."""
        moved = {field.name: _moved(getattr(self, field.name), device, how) for field in fields(self)}
        return self if all(value is getattr(self, name) for name, value in moved.items()) else replace(self, **moved)


def _moved(value: Any, device: torch.device | str | int, how: dict[str, Any]) -> Any:
    if isinstance(value, tuple):
        each = tuple(_moved(one, device, how) for one in value)
        return value if all(a is b for a, b in zip(each, value, strict=True)) else each
    return value.to(device, **how) if isinstance(value, Tensor | Movable | AttentionPlan | KeyGroups) else value


@dataclass(frozen=True, eq=False)
class Segments(Movable):
    """Two query segments over two copies of the keys: `order` lists the fine queries, then the coarse ones.

    plan: of their attention, or None.
    """

    fine: Tensor
    coarse: Tensor
    order: Tensor
    cu_q: Tensor
    cu_k: Tensor
    plan: AttentionPlan | None = None


def segments(coarse_query: Tensor, lengths: list[int] | None = None, keys: list[int] | None = None) -> Segments:
    """Segments of a (T,) bool of which queries are coarse: made once a step, not in every block.

    lengths: of the sequences that are packed in T; None for one. Every sequence has a segment of each kind, the fine
    ones of all sequences first, and its own keys in both copies: as many as queries, or `keys` of each.
    """
    device, total = coarse_query.device, len(coarse_query)
    lengths = lengths or [total]
    fine, coarse = (~coarse_query).nonzero()[:, 0], coarse_query.nonzero()[:, 0]
    chosen = torch.stack([part.sum() for part in coarse_query.split(lengths)]).tolist()
    queries = [n - m for n, m in zip(lengths, chosen, strict=True)] + chosen
    cu_q, cu_k = (cumulative(each, device) for each in (queries, (keys or lengths) * 2))
    return Segments(fine, coarse, torch.cat([fine, coarse]), cu_q, cu_k)


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """cu_seqlens (n + 1,) int32 of sequences that lie back to back."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True, eq=False)
class Packing(Movable):
    """Several sequences of different length in one launch, without padding.

    Both streams then have a batch of one and hold the rows of all sequences; `text` (T_text,) and `image` (T_image,)
    int64 say where each row lies in the joint sequence, [text | image] of one sequence after the other. of_longest
    (n,): max_seqlen held as a tensor length, so that Dynamo keeps it dynamic. plan: of their attention over all keys,
    or None.
    """

    text: Tensor
    image: Tensor
    cu_seqlens: Tensor
    of_longest: Tensor
    plan: AttentionPlan | None = None

    @property
    def total(self) -> int:
        """How many rows all sequences have."""
        return self.text.shape[0] + self.image.shape[0]

    @property
    def longest(self) -> int:
        """How many rows the longest sequence has."""
        return self.of_longest.shape[0]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the rows of the image's and the text's stream lie in the joint sequence."""
        return self.image, self.text

    def join(self, streams: Tensor) -> Tensor:
        """The joint sequence (1, n, ...) of both streams' rows, the text's first."""
        return torch.empty_like(streams).index_copy_(1, torch.cat([self.text, self.image]), streams)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The image's and the text's rows of a joint sequence."""
        return joint[:, self.image], joint[:, self.text]


def pack(texts: list[int], target: int, reference: int, device: torch.device) -> Packing:
    """Sequences [text | target | reference] of `texts` tokens and as many image tokens each.

    The image stream lists the target's tokens of every sequence first, then the references'.
    """
    lengths = [text + target + reference for text in texts]
    ends, counts = cumulative(lengths, device), torch.tensor(texts, device=device)
    starts = ends[:-1].long()
    shift = (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts, output_size=sum(texts))
    behind = (starts + counts)[:, None]
    image = [
        (behind + torch.arange(a, b, device=device)).flatten() for a, b in ((0, target), (target, target + reference))
    ]
    of_longest = torch.arange(max(lengths), device=device)
    return Packing(torch.arange(sum(texts), device=device) + shift, torch.cat(image), ends, of_longest)


@dataclass(frozen=True, eq=False)
class QueryRows(Movable):
    """Queries of a part of the sequence: `rows` (n,), the first n of the image stream.

    segments: of these rows, for phase-aligned RoPE. cu_seqlens: of these rows, for packed sequences with equally many
    each. before: (m,), as many as there are rows before them in the joint stream of single blocks. n and m are held as
    tensor lengths, so that Dynamo keeps them dynamic. plan: of packed rows' attention over all keys, or None.
    """

    rows: Tensor
    segments: Segments | None = None
    cu_seqlens: Tensor | None = None
    before: Tensor | None = None
    plan: AttentionPlan | None = None

    @property
    def total(self) -> int:
        """The same as `count`, as a packing has it."""
        return self.count

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def longest(self) -> int | None:
        """How many rows each packed sequence has."""
        return None if self.cu_seqlens is None else self.count // (self.cu_seqlens.shape[0] - 1)


def mark_all_dynamic(value: Any, dims: int = 2) -> None:
    """Mark the lengths of every tensor of a context as dynamic; a table's last dimension is the head's."""
    if isinstance(value, Movable | AttentionPlan):
        for field in fields(value):
            mark_all_dynamic(getattr(value, field.name))
    elif isinstance(value, KeyGroups):
        for rows in value.rows:
            mark_dynamic(rows, 1)
    elif isinstance(value, tuple):
        for table in value:
            if isinstance(table, Tensor):
                mark_dynamic(table, table.ndim - 1)
    else:
        mark_dynamic(value, dims)


def mark_dynamic(value: Any, dims: int) -> None:
    """Have Dynamo treat the first `dims` dimensions as dynamic from the first graph on, not from a second size."""
    # If Dynamo is not imported, nothing is compiled; importing it takes seconds.
    if isinstance(value, Tensor) and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(value, list(range(min(dims, value.ndim))))

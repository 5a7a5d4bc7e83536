"""What a mixed sequence adds to an attention call: which rows ask at which scale, and how sequences lie packed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """A frozen dataclass of tensors that `to` brings to a device: what accelerate's hooks ask of every argument."""

    def to(self, device: torch.device | str | int, **how: Any) -> Self:
        """Itself where all of it is there already; else a copy with every tensor moved. What is kept stays the one."""
        moved = {field.name: _moved(getattr(self, field.name), device, how) for field in fields(self)}
        return self if all(value is getattr(self, name) for name, value in moved.items()) else replace(self, **moved)


def _moved(value: Any, device: torch.device | str | int, how: dict[str, Any]) -> Any:
    if isinstance(value, tuple):
        each = tuple(_moved(one, device, how) for one in value)
        return value if all(a is b for a, b in zip(each, value, strict=True)) else each
    return value.to(device, **how) if isinstance(value, Tensor | Movable) else value


@dataclass(frozen=True, eq=False)
class Segments(Movable):
    """Two query segments over two copies of the keys: `order` lists fine queries, then coarse; cu_seqlens of both."""

    fine: Tensor
    coarse: Tensor
    order: Tensor
    cu_q: Tensor
    cu_k: Tensor


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
    (n,): as long as the longest sequence; of an integer torch.compile would make a constant.
    """

    text: Tensor
    image: Tensor
    cu_seqlens: Tensor
    of_longest: Tensor

    @property
    def longest(self) -> int:
        """How many rows the longest sequence has."""
        return self.of_longest.shape[0]


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
    """The rows that ask, where not every row of the sequence does: `rows` (n,), the first n of the image stream.

    segments: of these rows, for phase-aligned RoPE. cu_seqlens: of the rows of packed sequences, as many of each.

    Each edit has another n, which the length of a tensor may vary with, as in `Packing`.
    """

    rows: Tensor
    segments: Segments | None = None
    cu_seqlens: Tensor | None = None

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def longest(self) -> int | None:
        """How many rows each packed sequence has."""
        return None if self.cu_seqlens is None else self.count // (self.cu_seqlens.shape[0] - 1)


@dataclass(frozen=True, eq=False)
class MixedContext(Movable):
    """What a mixed sequence adds to an attention call; travels in `joint_attention_kwargs`.

    key_bias: (S,) or (B, S) float32 or None, log of the area of every key. segments: None, or which queries are
    coarse; with it they see all positions at the coarse scale (`coarse_rotary`, in the form of the model's own rotary
    tables): phase-aligned RoPE. packing: None, or how the streams hold several sequences. backend: of
    specedit_kernels, or "stock" for the model's own attention backend.

    A context serves every block of every step of a stage. What is the same for all of them is made with it: `rotary`
    and `coarse_rotary` as the kernel takes them, cos and sin (S, D/2) float32, and `index`, (S,) int64 from 0 to S - 1.

    store: None, or where every module keeps the keys and values (b, S, H, D) of its whole sequence, by its id. With
    `rows` (b, n) the call holds those rows of the sequence alone, at positions `rotary` (then (b, n, D/2)): they
    replace their keys and values in the store and attend to all of it; `asking` says so of packed sequences.

    read: None, or the rows whose output is read behind the last block, see models/last_block.py. plain: the model's own
    processors run in all blocks but that one.
    """

    key_bias: Tensor | None = None
    segments: Segments | None = None
    coarse_rotary: tuple[Tensor, Tensor] | None = None
    backend: str | None = None
    packing: Packing | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    index: Tensor | None = None
    store: dict[int, tuple[Tensor, Tensor]] | None = None
    rows: Tensor | None = None
    asking: QueryRows | None = None
    read: QueryRows | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        # Every edit has other lengths, and the first graph should serve them all.
        mark_all_dynamic(self)


def mark_all_dynamic(value: Any, dims: int = 2) -> None:
    """Mark the lengths of every tensor of a context as dynamic; a table's last dimension is the head's."""
    if isinstance(value, Movable):
        for field in fields(value):
            mark_all_dynamic(getattr(value, field.name))
    elif isinstance(value, tuple):
        for table in value:
            mark_dynamic(table, table.ndim - 1)
    else:
        mark_dynamic(value, dims)


def mark_dynamic(value: Any, dims: int) -> None:
    """Have Dynamo compile the first `dims` dimensions of a tensor as dynamic at once, not after a second size."""
    # Without Dynamo imported nothing is compiled, and importing it takes seconds.
    if isinstance(value, Tensor) and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(value, list(range(min(dims, value.ndim))))

"""Attention calls that keep keys and values, and calls of some rows with the kept ones of all others.

Storing  a Mixed or Packed call that leaves keys and values behind
Partial  some rows of such a sequence, with the stored keys and values of all others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contexts import ByKernels, Context, Rotated
from .fused_rows import FusedRows
from .sequences import Packing, Pair, QueryRows, Tables

KeysAndValues = dict[nn.Module, Pair]  # (b, S, H, D) each, of every attention module


@dataclass(frozen=True, eq=False, kw_only=True)
class Wrapped(Context):
    """A whole call, Mixed or Packed, to which something is added."""

    whole: ByKernels

    @property
    def rotary(self) -> Tables:
        return self.whole.rotary

    @property
    def output_rows(self) -> QueryRows | None:
        return self.whole.output_rows

    @property
    def kernels(self) -> str | None:
        return self.whole.backend

    @property
    def in_order(self) -> bool:
        return self.whole.in_order

    def places(self, text: int, image: int) -> tuple[Tensor, Tensor]:
        return self.whole.places(text, image)

    def join(self, image: Tensor, *text: Tensor) -> Tensor:
        return self.whole.join(image, *text)

    def split(self, joint: Tensor, text: int) -> tuple[Tensor, Tensor]:
        return self.whole.split(joint, text)

    def attend(self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | None, processor: Any) -> Tensor:
        return self.whole.attend(scales, v, query_rows, processor)


@dataclass(frozen=True, eq=False, kw_only=True)
class Storing(Wrapped):
    """A whole call whose keys and values every attention module leaves in `entries`."""

    entries: KeysAndValues

    @torch.compiler.disable  # it would compile for each module's own entry
    def update_kv_cache(self, attn: nn.Module, k: Tensor, v: Tensor, beside: Pair | None = None) -> Pair:
        self.entries[attn] = (k, v)
        return k, v


@dataclass(frozen=True, eq=False, kw_only=True)
class Partial(Context):
    """Some rows (b, n) of a whole sequence: they replace their keys and values in `entries` and attend to all of it.

    The streams hold these rows alone, in the order of the joint sequence, with tables (n, D/2) or (b, n, D/2) of their
    own. index: (n,) int64 from 0, or longer. query_rows: these rows, as `whole` takes them. packing: where the streams'
    rows lie among these rows, if `whole` is Packed and each sequence has text among them. fused: other rows that move,
    towards rows of the sequence, or of what is kept `beside` it.
    """

    whole: ByKernels
    entries: KeysAndValues
    rows: Tensor
    rotary: Tables
    index: Tensor
    query_rows: QueryRows | Packing
    output_rows: QueryRows | None
    packing: Packing | None = None
    fused: FusedRows | None = None

    @property
    def kernels(self) -> str | None:
        return self.whole.backend

    @property
    def in_order(self) -> bool:
        return self.packing is None

    def places(self, text: int, image: int) -> tuple[Tensor, Tensor]:
        return super().places(text, image) if self.packing is None else self.packing.places

    def join(self, image: Tensor, *text: Tensor) -> Tensor:
        streams = super().join(image, *text)
        return streams if self.packing is None else self.packing.join(streams)

    def split(self, joint: Tensor, text: int) -> tuple[Tensor, Tensor]:
        return super().split(joint, text) if self.packing is None else self.packing.split(joint)

    @torch.compiler.disable  # it would compile for each module's own entry
    def update_kv_cache(self, attn: nn.Module, k: Tensor, v: Tensor, beside: Pair | None = None) -> Pair:
        index = self.rows[..., None, None].expand_as(k)
        k, v = (kept.scatter(1, index, new) for kept, new in zip(self.entries[attn], (k, v), strict=True))
        if self.fused is not None:
            k, v = self.fused.fuse((k, v), beside)
        self.entries[attn] = (k, v)
        return k, v

    def attend(
        self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | Packing | None, processor: Any
    ) -> Tensor:
        return self.whole.attend(scales, v, self.query_rows if query_rows is None else query_rows, processor)

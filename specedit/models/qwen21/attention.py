"""Attention of the target's tokens beside the kept keys and values of text and references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21Attention,
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
)
from torch import Tensor, nn

from ..attention.contexts import ByKernels, Context, Rotated
from ..attention.fused_rows import FusedRows
from ..attention.kept_keys import KeysAndValues, Partial, Storing
from ..attention.processors import MixedProcessor, image_output, runs_stock, streams
from ..attention.sequences import QueryRows, Tables, mark_dynamic

ATTENTION = QwenImage21Attention


@dataclass(frozen=True, eq=False, kw_only=True)
class BesidePrefix(Context):
    """A call over the target's tokens, or over some of them.

    every: how they attend to all keys, the prefix's first, and which of the target's are kept; None: as in stock.
    """

    rotary: Tables
    index: Tensor
    every: Context | None
    output_rows: ClassVar[None] = None

    @property
    def kernels(self) -> str | None:
        return None if self.every is None else self.every.kernels

    @property
    def is_stock(self) -> bool:
        return self.every is None

    @property
    def whole(self) -> ByKernels:
        """How all of the target's tokens attend, of a call without what it keeps."""
        assert isinstance(self.every, ByKernels)
        return self.every

    def storing(self, entries: KeysAndValues) -> BesidePrefix:
        """The same call, which leaves the target's keys and values in `entries`."""
        return replace(self, every=Storing(whole=self.whole, entries=entries))

    def of_rows(self, rows: Tensor, rotary: Tables) -> BesidePrefix:
        """A call over the rows (b, n) of this one's target, with tables (b, n, D/2)."""
        every = Partial(
            whole=self.whole, entries={}, rows=rows, rotary=rotary, index=self.index, query_rows=QueryRows(rows[0]),
            output_rows=None,
        )  # fmt: skip
        return replace(self, rotary=rotary, every=every)

    def with_entries(self, entries: KeysAndValues, fused: FusedRows | None) -> BesidePrefix:
        """A call over some rows, with what a step keeps of the others."""
        assert isinstance(self.every, Partial)  # as `of_rows` makes it
        return replace(self, every=replace(self.every, entries=entries, fused=fused))

    def for_graph(self, block: dict[str, Any]) -> dict[str, Any]:
        layer = block["layer_cache"]
        for rows, dims in ((block["rotary_emb"], 1), (block["target_token_mask"], 1), (layer.k, 2), (layer.v, 2)):
            mark_dynamic(rows, dims)
        return {}

    def with_kept(self, owner: Any, scales: list[Rotated], v: Tensor) -> tuple[list[Rotated], Tensor]:
        assert self.every is not None  # else the stock processor runs
        (attn, layer), (q, k) = owner, scales[0]
        prefix = layer.get()
        k, v = self.every.update_kv_cache(attn, k, v, prefix)
        return [Rotated(q, torch.cat([prefix[0], k], 1))], torch.cat([prefix[1], v], 1)

    def attend(self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | None, processor: Any) -> Tensor:
        assert self.every is not None
        return self.every.attend(scales, v, query_rows, processor)


@dataclass(frozen=True, eq=False)
class PrefixLayer:
    """What a block is given as its `layer_cache`: keys and values (b, P, H, D) of the prefix, and the context."""

    k: Tensor
    v: Tensor
    context: BesidePrefix

    def get(self) -> tuple[Tensor, Tensor]:
        """Keys and values, as the stock processors ask for them."""
        return self.k, self.v


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """What the transformer is given as its `kv_cache`."""

    layers: tuple[PrefixLayer, ...]

    def get_layer(self, index: int) -> PrefixLayer:
        """A block's."""
        return self.layers[index]


class Qwen21MixedProcessor(MixedProcessor):
    """The single-stream blocks."""

    stock = QwenImage21AttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        context = layer_cache.context if isinstance(layer_cache, PrefixLayer) else None
        if runs_stock(context, None):
            return self.original(
                attn, hidden_states, attention_mask, rotary_emb, layer_cache, kv_cache_mode, cache_write_slice,
                segments, key_valid,
            )  # fmt: skip
        # By the width of a head, not by their number: a tensor-parallel rank has its share of them.
        each = streams(attn, attn.inner_dim // attn.heads, hidden_states, None, None)
        return image_output(attn, self.attended(attn, each, context, None, (attn, layer_cache)).to(hidden_states.dtype))


class Qwen21FlexMixedProcessor(Qwen21MixedProcessor, QwenImage21FlexAttnProcessor):
    """In place of the processor for which the transformer makes a mask of blocks."""

    stock = QwenImage21FlexAttnProcessor


WRAPPERS: dict[type, type[MixedProcessor]] = {
    QwenImage21AttnProcessor: Qwen21MixedProcessor, QwenImage21FlexAttnProcessor: Qwen21FlexMixedProcessor,
}  # fmt: skip


def wrap(original: Any) -> MixedProcessor:
    """The replacement of one of diffusers' processors, by its class."""
    return WRAPPERS[type(original)](original)

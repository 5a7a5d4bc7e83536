"""Attention where references see nothing but each other, so that their keys and values are computed once.

Rows are text, references, target in the call that computes the references, and text, target in those that find their
keys and values. These lie in the transformer's own cache, which it hands every attention module as `kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor, nn

from ..attention.contexts import Context, Rotated
from ..attention.processors import MixedProcessor, runs_stock
from ..attention.sequences import QueryRows, Tables, mark_dynamic
from .attention import ATTENTION, WRAPPERS, Flux2MixedProcessor, Flux2SingleProcessor

COUNTS = ("num_ref_tokens", "num_txt_tokens")  # which only the stock processors read


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptReference:
    """The references' keys and values of every attention module."""

    cache: Flux2KVCache

    @property
    def memory(self) -> int:
        """In bytes."""
        layers = (*self.cache.double_block_caches, *self.cache.single_block_caches)
        kept = [tensor for layer in layers for tensor in (layer.k_ref, layer.v_ref) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


@dataclass(frozen=True, eq=False, kw_only=True)
class BesideReference(Context):
    """What both kinds of calls share.

    rotary, coarse: tables of the call's rows; `coarse` at the scale of coarse queries, or None for one scale. every:
    how text and target attend to all keys, in the order text, references, target. text: (t,), as many as the call has
    rows of text. keeps_text: whether what is kept holds the text's keys and values too, before the references'.
    """

    rotary: Tables
    coarse: Tables | None
    index: Tensor
    every: Context
    text: Tensor
    keeps_text: bool
    output_rows: QueryRows | None

    @property
    def kernels(self) -> str | None:
        return self.every.kernels

    @property
    def scales(self) -> tuple[Tables, ...]:
        return (self.rotary,) if self.coarse is None else (self.rotary, self.coarse)

    def for_graph(self, block: dict[str, Any]) -> dict[str, Any]:
        joint = block["joint_attention_kwargs"]
        cache = joint["kv_cache"]
        for rows in (block.get("temb_mod_img"), block.get("temb_mod"), cache.k_ref, cache.v_ref):
            if rows is not None and rows.ndim > 2:  # references have a modulation of their own
                mark_dynamic(rows, 2)
        if self.is_stock:
            return {}
        return {"joint_attention_kwargs": joint | {name: 0 for name in COUNTS if name in joint}}

    @property
    def is_stock(self) -> bool:
        return self.every.is_stock and not self.keeps_text


@dataclass(frozen=True, eq=False, kw_only=True)
class WithReference(BesideReference):
    """A call that computes the references too. among: how they attend to each other. references: (r,), as many."""

    among: Context
    references: Tensor

    @property
    def bounds(self) -> tuple[int, int]:
        """The first of the references' rows, and the first after them."""
        text = self.text.shape[0]
        return text, text + self.references.shape[0]  # no slice: Dynamo would specialise on its ends

    def with_kept(self, owner: Any, scales: list[Rotated], v: Tensor) -> tuple[list[Rotated], Tensor]:
        start, stop = self.bounds
        first = 0 if self.keeps_text else start
        owner.store(torch.cat([k[:, first:stop] for _, k in scales], -1), v[:, first:stop].clone())
        return scales, v

    def attend(self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | None, processor: Any) -> Tensor:
        if query_rows is not None:  # of the target
            return self.every.attend(scales, v, query_rows, processor)
        start, stop = self.bounds
        others = [Rotated(torch.cat([q[:, :start], q[:, stop:]], 1), k) for q, k in scales]
        out = self.every.attend(others, v, None, processor)
        each = [Rotated(*(rows[:, start:stop].contiguous() for rows in scale)) for scale in scales]
        references = self.among.attend(each, v[:, start:stop].contiguous(), None, processor)
        return torch.cat([out[:, :start], references, out[:, start:]], 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class WithoutReference(BesideReference):
    """A call that finds the references' keys and values; without text it finds the text's too."""

    def with_kept(self, owner: Any, scales: list[Rotated], v: Tensor) -> tuple[list[Rotated], Tensor]:
        text = self.text.shape[0]
        skipped = text if self.keeps_text else 0
        keys, values = owner.k_ref[:, skipped:], owner.v_ref[:, skipped:]
        parts = zip(scales, keys.chunk(len(scales), -1), strict=True)
        whole = [Rotated(q, torch.cat([k[:, :text], kept, k[:, text:]], 1)) for (q, k), kept in parts]
        joined = torch.cat([v[:, :text], values, v[:, text:]], 1)
        if skipped:  # the text's are new
            fresh = torch.cat([k[:, :text] for _, k in scales], -1)
            owner.store(torch.cat([fresh, keys], 1), torch.cat([v[:, :text], values], 1))
        return whole, joined

    def attend(self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | None, processor: Any) -> Tensor:
        return self.every.attend(scales, v, query_rows, processor)


class Flux2KVMixedProcessor(Flux2MixedProcessor):
    """The double blocks."""

    stock = Flux2KVAttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
        specedit: Context | None = None,
        rows: slice | None = None,
    ) -> Any:
        if runs_stock(specedit, rows):
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, kv_cache=kv_cache,
                kv_cache_mode=kv_cache_mode, num_ref_tokens=num_ref_tokens,
            )  # fmt: skip
        return self.joint(attn, attn.head_dim, hidden_states, encoder_hidden_states, specedit, rows, kv_cache)


class Flux2KVSingleProcessor(Flux2SingleProcessor):
    """The single blocks."""

    stock = Flux2KVParallelSelfAttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
        specedit: Context | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        if runs_stock(specedit, rows):
            return self.original(
                attn, hidden_states, attention_mask, image_rotary_emb, kv_cache=kv_cache, kv_cache_mode=kv_cache_mode,
                num_txt_tokens=num_txt_tokens, num_ref_tokens=num_ref_tokens,
            )  # fmt: skip
        return self.parallel(attn, hidden_states, specedit, rows, kv_cache)


def plain_processor(module: nn.Module) -> str | None:
    """The name of an attention module's processor that keeps no references, or None."""
    if not isinstance(module, ATTENTION):
        return None
    processor = module.processor
    own = processor.original if isinstance(processor, MixedProcessor) else processor
    return None if isinstance(own, Flux2KVAttnProcessor | Flux2KVParallelSelfAttnProcessor) else type(own).__name__


WRAPPERS |= {Flux2KVAttnProcessor: Flux2KVMixedProcessor, Flux2KVParallelSelfAttnProcessor: Flux2KVSingleProcessor}

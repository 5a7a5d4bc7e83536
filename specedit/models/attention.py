"""Attention over mixed sequences: processors that hand the layout to specedit_kernels, and otherwise step aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from specedit_kernels import mixed_attention, qk_norm_rope


@dataclass(frozen=True, eq=False)
class Segments:
    """Two query segments over two copies of the keys: `order` lists fine queries, then coarse; cu_seqlens of both."""

    fine: Tensor
    coarse: Tensor
    order: Tensor
    cu_q: Tensor
    cu_k: Tensor


def segments(coarse_query: Tensor) -> Segments:
    """Segments of a (S,) bool of which queries are coarse: made once a step, not in every block."""
    fine, coarse = (~coarse_query).nonzero()[:, 0], coarse_query.nonzero()[:, 0]
    n = len(coarse_query)
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32, device=coarse_query.device) for ends in ([0, len(fine), n], [0, n, 2 * n])
    )
    return Segments(fine, coarse, torch.cat([fine, coarse]), cu_q, cu_k)


@dataclass(frozen=True, eq=False)
class MixedContext:
    """What a mixed sequence adds to an attention call; travels in `joint_attention_kwargs`.

    key_bias: (S,) float32 or None, log of the area of every key. segments: None, or which queries are coarse; with it
    they see all positions at the coarse scale (`coarse_rotary`, cos and sin (S, D)): phase-aligned RoPE.

    A context serves every block of every step of a stage. What is the same for all of them is made with it: `rotary`
    and `coarse_rotary` as the kernel takes them, cos and sin (S, D/2) float32, and `index`, (S,) int64 from 0 to S - 1.
    """

    key_bias: Tensor | None = None
    segments: Segments | None = None
    coarse_rotary: tuple[Tensor, Tensor] | None = None
    backend: str | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    index: Tensor | None = None


class FluxMixedProcessor:
    """Joint attention of FLUX with a bias per key. Without a context it is the processor that it replaced."""

    def __init__(self, original: Any = None):  # diffusers makes new processors of a class without arguments
        self.original = original if original is not None else FluxAttnProcessor()

    # diffusers sets the attention backend on the processor that it finds.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: MixedContext | None = None,
    ):
        if specedit is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        heads, backend = attn.head_dim, specedit.backend
        streams = [(hidden_states, _projections(attn, "to_q", "to_k", "to_v", "to_qkv"), attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = _projections(attn, "add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv")
            streams.insert(0, (encoder_hidden_states, added, attn.norm_added_q, attn.norm_added_k))
        batch, length = hidden_states.shape[0], sum(s[0].shape[1] for s in streams)
        cos, sin = half_tables(specedit.rotary or image_rotary_emb, heads)
        index = specedit.index if specedit.index is not None else torch.arange(length, device=hidden_states.device)
        joint, coarse = None, None
        start = 0
        for states, project, norm_q, norm_k in streams:
            q, k, v = (x.unflatten(-1, (-1, heads)) for x in project(states))
            if joint is None:  # text and image are normed, rotated and placed side by side in one pass each
                shape = (batch, length, *q.shape[2:])
                joint = [q.new_empty(shape) for _ in range(3)]
                coarse = [q.new_empty(shape) for _ in range(2)] if specedit.segments is not None else None
            stop = start + states.shape[1]
            rotary = [(cos, sin, joint, v)]
            if coarse is not None:
                rotary.append((*half_tables(specedit.coarse_rotary, heads), coarse, None))
            for c, n, out, values in rotary:
                rows = index[start:stop]
                _place(q, k, values, norm_q, norm_k, c[start:stop], n[start:stop], out, start, rows, backend)
            start = stop
        out = _attend(joint, coarse, specedit).flatten(2, 3).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image, attn.to_add_out(out[:, :text].contiguous())


def _place(q, k, v, norm_q, norm_k, cos, sin, out, start: int, index: Tensor, backend: str | None) -> None:
    """Norm and rotate q and k, and write them (and v) into rows `start` and on, listed in `index`, of the sequence."""
    stop = start + q.shape[1]
    if norm_q.weight.device == q.device:
        weights = (norm_q.weight, norm_k.weight)
        qk_norm_rope(q, k, *weights, cos, sin, eps=norm_q.eps, v=v, out_index=index, out=out, backend=backend)
        return
    # Offloaded module by module: a norm's weights only come to the device when the norm itself is called.
    for x, norm, target in ((q, norm_q, out[0]), (k, norm_k, out[1])):
        even, odd = norm(x).float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        target[:, start:stop] = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).to(target.dtype)
    if v is not None:
        out[2][:, start:stop] = v


def _projections(attn: nn.Module, q: str, k: str, v: str, fused: str):
    if getattr(attn, "fused_projections", False):
        return lambda x: getattr(attn, fused)(x).chunk(3, dim=-1)
    return lambda x: (getattr(attn, q)(x), getattr(attn, k)(x), getattr(attn, v)(x))


def half_tables(tables: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (S, dim / 2), from diffusers' (S, dim) or as they are."""
    return tuple(table if 2 * table.shape[-1] == dim else half_table(table) for table in tables)


def half_table(table: Tensor) -> Tensor:
    """diffusers lists every angle twice (S, D); the kernel takes it once (S, D/2), float32."""
    return table[:, ::2].float().contiguous()


def _attend(joint: list[Tensor], coarse: list[Tensor] | None, context: MixedContext) -> Tensor:
    q, k, v = joint
    bias = None if context.key_bias is None else context.key_bias.expand(q.shape[0], -1)
    if coarse is None:
        return mixed_attention(q, k, v, key_bias=bias, backend=context.backend)
    # Two query segments over two rotated copies of the keys, packed into one launch for each sample.
    out = torch.empty_like(q)
    parts = context.segments
    for b in range(q.shape[0]):
        packed_q = torch.cat([q[b, parts.fine], coarse[0][b, parts.coarse]])
        packed_k = torch.cat([k[b], coarse[1][b]])
        packed_bias = None if bias is None else bias[b].repeat(2)
        out[b, parts.order] = mixed_attention(
            packed_q, packed_k, v[b].repeat(2, 1, 1), cu_seqlens_q=parts.cu_q, cu_seqlens_k=parts.cu_k,
            key_bias=packed_bias, backend=context.backend,
        )  # fmt: skip
    return out


def attach(transformer: nn.Module, attention_class: type, processor_class: type) -> None:
    """Wrap the processor of every attention module.

    One that is wrapped already is left alone, and so is one with weights (an IP-Adapter's), which belongs to the model.
    """
    for module in transformer.modules():
        if isinstance(module, attention_class) and not isinstance(module.processor, (FluxMixedProcessor, nn.Module)):
            module.processor = processor_class(module.processor)


def detach(transformer: nn.Module, attention_class: type) -> None:
    """Put back what `attach` wrapped."""
    for module in transformer.modules():
        if isinstance(module, attention_class) and isinstance(module.processor, FluxMixedProcessor):
            module.processor = module.processor.original

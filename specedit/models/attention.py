"""Attention over mixed sequences: processors that hand the layout to specedit_kernels, and otherwise step aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from specedit_kernels import mixed_attention, qk_norm_rope


@dataclass(frozen=True, eq=False)
class MixedContext:
    """What a mixed sequence adds to an attention call; travels in `joint_attention_kwargs`.

    key_bias: (S,) float32 or None, log of the area of every key. coarse_query: (S,) bool or None; with it queries of
    coarse tokens see all positions at the coarse scale (`coarse_rotary`, cos and sin (S, D)): phase-aligned RoPE.
    """

    key_bias: Tensor | None = None
    coarse_query: Tensor | None = None
    coarse_rotary: tuple[Tensor, Tensor] | None = None
    backend: str | None = None


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
        cos, sin = (half_table(table) for table in image_rotary_emb)
        joint, coarse = None, None
        start = 0
        for states, project, norm_q, norm_k in streams:
            q, k, v = (x.unflatten(-1, (-1, heads)) for x in project(states))
            if joint is None:  # text and image are normed, rotated and placed side by side in one pass each
                shape = (batch, length, *q.shape[2:])
                joint = [q.new_empty(shape) for _ in range(3)]
                coarse = [q.new_empty(shape) for _ in range(2)] if specedit.coarse_query is not None else None
            stop = start + states.shape[1]
            index = torch.arange(start, stop, device=q.device)
            weights = dict(eps=norm_q.eps, out_index=index, backend=backend)
            qk_norm_rope(
                q, k, norm_q.weight, norm_k.weight, cos[start:stop], sin[start:stop], v=v, out=joint, **weights
            )
            if coarse is not None:
                small_cos, small_sin = (half_table(table)[start:stop] for table in specedit.coarse_rotary)
                qk_norm_rope(q, k, norm_q.weight, norm_k.weight, small_cos, small_sin, out=coarse, **weights)
            start = stop
        out = _attend(joint, coarse, specedit).flatten(2, 3).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image, attn.to_add_out(out[:, :text].contiguous())


def _projections(attn: nn.Module, q: str, k: str, v: str, fused: str):
    if getattr(attn, "fused_projections", False):
        return lambda x: getattr(attn, fused)(x).chunk(3, dim=-1)
    return lambda x: (getattr(attn, q)(x), getattr(attn, k)(x), getattr(attn, v)(x))


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
    small, large = context.coarse_query.nonzero()[:, 0], (~context.coarse_query).nonzero()[:, 0]
    n = q.shape[1]
    cu_q = torch.tensor([0, len(large), n], dtype=torch.int32, device=q.device)
    cu_k = torch.tensor([0, n, 2 * n], dtype=torch.int32, device=q.device)
    order = torch.cat([large, small])
    for b in range(q.shape[0]):
        packed_q = torch.cat([q[b, large], coarse[0][b, small]])
        packed_k = torch.cat([k[b], coarse[1][b]])
        packed_bias = None if bias is None else bias[b].repeat(2)
        out[b, order] = mixed_attention(
            packed_q, packed_k, v[b].repeat(2, 1, 1), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=packed_bias,
            backend=context.backend,
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

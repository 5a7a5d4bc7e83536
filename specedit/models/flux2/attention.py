"""Processors of FLUX.2's attention, and its last block: a single one, whose stream begins with the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from torch import Tensor, nn

from ..attention.contexts import Context
from ..attention.last_block import LastBlock, clipped
from ..attention.processors import FluxMixedProcessor, MixedProcessor, Stream, image_output, runs_stock

ATTENTION = (Flux2Attention, Flux2ParallelSelfAttention)


class Flux2MixedProcessor(FluxMixedProcessor):
    """The double blocks: FLUX.1's attention, whose output modules are called in another order."""

    stock = Flux2AttnProcessor

    @staticmethod
    def projected(attn: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = attn.to_add_out(text.contiguous()) if text.shape[1] else text
        return image_output(attn, image), text


class Flux2SingleProcessor(MixedProcessor):
    """The single blocks: one stream, and the projections of attention and MLP in one matrix."""

    stock = Flux2ParallelSelfAttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: Context | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        if runs_stock(specedit, rows):
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        return self.parallel(attn, hidden_states, specedit, rows)

    def parallel(
        self, attn: nn.Module, states: Tensor, context: Context, rows: slice | None, owner: Any = None
    ) -> Tensor:
        """The stock processor's output as a context says; with `rows`, of these rows."""
        joined = attn.to_qkv_mlp_proj(states)
        own, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        split = joined.shape[-1] * own // (own + mlp)  # by ratio: a tensor-parallel rank has its share of both
        qkv, hidden = joined[..., :split], joined[..., split:]
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1))
        if isinstance(rows, slice):
            q, hidden = q[:, rows], hidden[:, rows]
        streams = [Stream(0, states.shape[1], q, k, v, attn.norm_q, attn.norm_k)]
        attended = self.attended(attn, streams, context, rows, owner).to(q.dtype)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(hidden)], dim=-1))


class Flux2LastBlock(LastBlock):
    """Flux2SingleTransformerBlock, whose rows are text and images; those that are read come after `before` others.

    The projection that attention and MLP share runs for every row, since keys and values are among its outputs.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = (kwargs.get("joint_attention_kwargs") or {}).get("specedit")
        if args or not self.is_trimmed(context) or kwargs.get("encoder_hidden_states") is not None:
            return self.stock(*args, **kwargs)
        block, states = self.block, kwargs["hidden_states"]
        start = context.output_rows.before.shape[0]
        rows = slice(start, start + context.output_rows.count)
        shift, scale, gate = modulation(kwargs)
        attended = block.attn(
            hidden_states=(1 + scale) * block.norm(states) + shift, image_rotary_emb=kwargs["image_rotary_emb"],
            rows=rows, **kwargs["joint_attention_kwargs"],
        )  # fmt: skip
        gate = gate if gate.shape[1] == 1 else gate[:, rows]
        target = clipped(states[:, rows] + gate * attended)
        return torch.cat([states[:, :start], target], 1)  # the transformer drops the rows before


def modulation(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate (b, 1 or S, D) among a single block's arguments: one tensor, in older versions three."""
    if "temb_mod" not in kwargs:
        return kwargs["temb_mod_params"]
    joined = kwargs["temb_mod"]
    shift, scale, gate = (joined if joined.ndim == 3 else joined.unsqueeze(1)).chunk(3, dim=-1)
    return shift, scale, gate


WRAPPERS: dict[type, type[MixedProcessor]] = {
    Flux2AttnProcessor: Flux2MixedProcessor, Flux2ParallelSelfAttnProcessor: Flux2SingleProcessor,
}  # fmt: skip


def wrap(original: Any) -> MixedProcessor:
    """The replacement of one of diffusers' processors, by its class."""
    return WRAPPERS[type(original)](original)

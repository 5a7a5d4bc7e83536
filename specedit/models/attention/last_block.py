"""The last block of a transformer, trimmed to the rows whose output is used.

Only target rows of the last block's output are used, so queries, MLP and projection run for those rows only; keys and
values are those of all rows. The block's own modules compute them, so LoRA, quantisation, compilation and offloading
work as usual. A hook replaces the block's `forward`, and calls the stock one unless a context names the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .contexts import Context
from .processors import MixedProcessor


class LastBlock:
    """Replaces `forward` of the last block. It keeps no state: what a call needs comes with the call."""

    def __init__(self, block: nn.Module):
        self.block, self.stock = block, block.forward

    def is_trimmed(self, context: Context | None) -> bool:
        """Whether a call names its output rows, and no other library splits the sequence over several devices."""
        processor = self.block.attn.processor
        return (
            context is not None
            and context.output_rows is not None
            and isinstance(processor, MixedProcessor)
            and processor._parallel_config is None
        )


class FluxLastBlock(LastBlock):
    """FluxSingleTransformerBlock, whose rows are text, target, reference."""

    def context(self, kwargs: dict[str, Any] | None, rotary: tuple | None) -> Context | None:
        return (kwargs or {}).get("specedit")

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, context = self.block, self.context(joint_attention_kwargs, image_rotary_emb)
        if not self.is_trimmed(context):
            more = {} if joint_attention_kwargs is None else {"joint_attention_kwargs": joint_attention_kwargs}
            return self.stock(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                image_rotary_emb=image_rotary_emb, **more,
            )  # fmt: skip
        text = encoder_hidden_states.shape[1]
        rows = slice(text, text + context.output_rows.count)
        normed, gate = block.norm(torch.cat([encoder_hidden_states, hidden_states], 1), emb=temb)
        activated = block.act_mlp(block.proj_mlp(normed[:, rows]))
        attended = block.attn(
            hidden_states=normed, image_rotary_emb=image_rotary_emb, rows=rows, **(joint_attention_kwargs or {})
        )
        out = gate.unsqueeze(1) * block.proj_out(torch.cat([attended, activated], 2))
        return encoder_hidden_states, clipped(hidden_states[:, : context.output_rows.count] + out)


class QwenLastBlock(LastBlock):
    """QwenImageTransformerBlock, whose image stream begins with the target's rows (of all packed sequences)."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, context = self.block, (joint_attention_kwargs or {}).get("specedit")
        # Older blocks have no such argument, and newer ones only have it where target and reference differ.
        index = {} if modulate_index is None else {"modulate_index": modulate_index}
        if not self.is_trimmed(context):
            return self.stock(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states,
                encoder_hidden_states_mask=encoder_hidden_states_mask, temb=temb, image_rotary_emb=image_rotary_emb,
                joint_attention_kwargs=joint_attention_kwargs, **index,
            )  # fmt: skip
        rows = slice(0, context.output_rows.count)
        whole, part = ((), ()) if modulate_index is None else ((modulate_index,), (modulate_index[:, rows],))
        first, second = block.img_mod(temb).chunk(2, dim=-1)
        text_temb = temb.chunk(2, dim=0)[0] if getattr(block, "zero_cond_t", False) else temb
        text_first, _ = block.txt_mod(text_temb).chunk(2, dim=-1)
        image, gate = block._modulate(block.img_norm1(hidden_states), first, *whole)
        text, _ = block._modulate(block.txt_norm1(encoder_hidden_states), text_first)
        attended = block.attn(
            hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb, rows=rows, **joint_attention_kwargs,
        )  # fmt: skip
        target = hidden_states[:, rows] + gate[:, rows] * attended
        normed, gate = block._modulate(block.img_norm2(target), second, *part)
        return encoder_hidden_states, clipped(target + gate * block.img_mlp(normed))


def clipped(states: Tensor) -> Tensor:
    """Clipped to fp16's range, as in the stock blocks."""
    return states.clip(-65504, 65504) if states.dtype == torch.float16 else states


def last(transformer: nn.Module, blocks: str) -> nn.Module | None:
    """The last of a transformer's `blocks`; None of one without any, such as another engine's."""
    return next(iter(getattr(transformer, blocks, ())[-1:]), None)


def attach(block: nn.Module | None, block_class: type, hook: Callable[[nn.Module], LastBlock]) -> None:
    """Put the hook in place; idempotent.

    A block of another class, or one whose `forward` another library has taken over (to bring its weights to the device
    first), is left alone: it computes every row, as stock does.
    """
    if type(block) is block_class and "forward" not in vars(block):
        block.forward = hook(block)


def attached(block: nn.Module | None) -> bool:
    return block is not None and isinstance(vars(block).get("forward"), LastBlock)


def trims(block: nn.Module | None) -> bool:
    """Whether a call computes the output rows alone.

    Not under leaf-level group offloading: each layer prefetches the next one, and some would not be called.
    """
    return attached(block) and not any(
        "group_offloading" in getattr(getattr(part, "_diffusers_hook", None), "hooks", ())
        for part in block.modules()
        if part is not block
    )


def detach(block: nn.Module | None) -> None:
    """Take the hook out again."""
    if attached(block):
        del block.forward

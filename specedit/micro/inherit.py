"""Lets an untrained Qwen editor take over what the trained Kontext editor knows: its latents and its blocks' weights.

Both transformers are MMDiTs (Esser et al. 2024) of the same width here, with the same rotary angles between picture
tokens. A double-stream block of FLUX has the parts of a Qwen block; a single-stream block becomes one whose two streams
share weights, with attention and MLP one after the other instead of side by side. What differs is learned again: the
words, which another text encoder says, and what FLUX's pooled prompt said.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from . import scenes
from .family import of
from .family_kontext import KONTEXT
from .training import seeds

# The single-stream block without which the Kontext editor loses least: seven such blocks would be more than 40 MB.
LEFT_OUT = 0
GUIDANCE = 3.5  # FluxKontextPipeline's default; the transformer embeds a thousand times this
TO_Q = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
SAME = 0.1  # latents that are apart by less of their variance are the same to a transformer


@torch.no_grad()
def inherit(pipe: Any, teacher: Any) -> None:
    """Let a QwenImageEditPipeline's transformer take over that of a trained FluxKontextPipeline, but for `txt_in`."""
    prompts = [scenes.describe(seed).prompt for seed in seeds(0, 64)]
    pooled = KONTEXT.text(teacher, prompts, None, "cpu")[1]
    take_over(pipe.transformer, teacher.transformer, pooled)


@torch.no_grad()
def take_over(target: QwenImageTransformer2DModel, source: FluxTransformer2DModel, pooled: Tensor) -> None:
    """Write the source's weights into the target. `pooled` (B, D): pooled prompts, whose mean becomes a constant.

    Raises:
        ValueError: the two differ in width, heads or number of blocks.
    """
    blocks = len(source.transformer_blocks) + len(source.single_transformer_blocks) - 1
    for name, ours, theirs in (
        ("width", target.inner_dim, source.inner_dim),
        ("heads", target.config.num_attention_heads, source.config.num_attention_heads),
        ("blocks", len(target.transformer_blocks), blocks),
    ):
        if ours != theirs:
            raise ValueError(f"{name}: expected {theirs}, as the editor to take over has, got {ours}")
    for i, (block, theirs) in enumerate(taken_over(target, source)):
        (from_double if i < len(source.transformer_blocks) else from_single)(block, theirs)
    _copy(target.img_in, source.x_embedder)
    _copy(target.norm_out, source.norm_out)
    _copy(target.proj_out, source.proj_out)
    ours, theirs = target.time_text_embed, source.time_text_embed
    _copy(ours.timestep_embedder, theirs.timestep_embedder)
    guidance = theirs.time_proj(torch.tensor([1000.0 * GUIDANCE], device=pooled.device))
    constant = theirs.guidance_embedder(guidance)[0] + theirs.text_embedder(pooled).mean(0)
    ours.timestep_embedder.linear_2.bias += constant


def taken_over(
    target: QwenImageTransformer2DModel, source: FluxTransformer2DModel
) -> list[tuple[nn.Module, nn.Module]]:
    """The target's blocks, each with the source's that it takes over."""
    singles = [b for i, b in enumerate(source.single_transformer_blocks) if i != LEFT_OUT]
    return list(zip(target.transformer_blocks, [*source.transformer_blocks, *singles], strict=True))


@torch.no_grad()
def from_double(block: nn.Module, double: nn.Module) -> None:
    """Make a Qwen block compute what a double-stream block of FLUX does."""
    _copy(block.img_mod[1], double.norm1.linear)
    _copy(block.txt_mod[1], double.norm1_context.linear)
    _copy(block.attn, double.attn)
    _copy(block.img_mlp, double.ff)
    _copy(block.txt_mlp, double.ff_context)


@torch.no_grad()
def from_single(block: nn.Module, single: nn.Module) -> None:
    """Make a Qwen block compute what a single-stream block of FLUX does, but for the MLP's input: after attention."""
    width = single.proj_out.out_features
    for mod in (block.img_mod[1], block.txt_mod[1]):  # shift, scale and gate, of attention and of the MLP
        for name, parameter in mod.named_parameters():
            parameter.copy_(torch.cat([getattr(single.norm.linear, name)] * 2))
    attn, theirs = block.attn, single.attn
    for ours, name in zip((*TO_Q, *ADDED), TO_Q * 2, strict=True):
        _copy(getattr(attn, ours), getattr(theirs, name))
    for norm in ("q", "k"):
        _copy(getattr(attn, f"norm_{norm}"), getattr(theirs, f"norm_{norm}"))
        _copy(getattr(attn, f"norm_added_{norm}"), getattr(theirs, f"norm_{norm}"))
    for out in (attn.to_out[0], attn.to_add_out):
        out.weight.copy_(single.proj_out.weight[:, :width])
        out.bias.copy_(single.proj_out.bias)
    for mlp in (block.img_mlp, block.txt_mlp):
        _copy(mlp.net[0].proj, single.proj_mlp)
        mlp.net[2].weight.copy_(single.proj_out.weight[:, width:])
        mlp.net[2].bias.zero_()


@torch.no_grad()
def distance(pipe: Any, teacher: Any) -> float:
    """Mean squared distance of a Qwen editor's latents from a Kontext editor's, in units of the latter's variance."""
    images = scenes.draw([scenes.describe(seed) for seed in seeds(0, 8)], 128, 128)[0] * 2 - 1
    theirs = KONTEXT.latents(teacher.vae, images)
    return float(F.mse_loss(of(pipe).latents(pipe.vae, images), theirs) / theirs.var())


def same_latents(vae: nn.Module, teacher: nn.Module) -> None:
    """Let a Qwen autoencoder that encodes as `teacher` does also normalise as it does."""
    channels = vae.config.z_dim
    vae.register_to_config(
        latents_mean=[teacher.config.shift_factor] * channels,
        latents_std=[1 / teacher.config.scaling_factor] * channels,
    )


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())

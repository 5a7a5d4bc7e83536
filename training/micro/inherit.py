"""Initialises a Qwen editor from the trained Kontext editor: its latents and its blocks' weights.

Both transformers are MMDiTs (Esser et al. 2024) of the same width here, with the same rotary angles between image
tokens. A double-stream block of FLUX has the parts of a Qwen block. A single-stream block becomes one whose two streams
share weights, with attention and MLP in sequence instead of in parallel. The text has to be learned anew: the text
encoder is another one, and Qwen has no pooled prompt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from specedit.micro import scenes

from .families import family_of
from .family_kontext import KONTEXT
from .loop import seeds

# The single-stream block that the Kontext editor misses least. Seven blocks would exceed 40 MB.
LEFT_OUT = 0
GUIDANCE = 3.5  # FluxKontextPipeline's default; the transformer embeds it times 1000
TO_Q = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
SAME_LATENTS = 0.1  # relative squared distance below which a transformer can use one editor's latents for another's


@torch.no_grad()
def inherit_transformer(pipe: Any, teacher: Any) -> None:
    """Copy a trained FluxKontextPipeline's transformer into a QwenImageEditPipeline's, except `txt_in`, in place."""
    prompts = [scenes.describe(seed).prompt for seed in seeds(0, 64)]
    pooled = KONTEXT.text(teacher, prompts, None, "cpu")[1]
    copy_transformer(pipe.transformer, teacher.transformer, pooled)


@torch.no_grad()
def copy_transformer(target: QwenImageTransformer2DModel, source: FluxTransformer2DModel, pooled: Tensor) -> None:
    """Copy the source's weights into the target. `pooled` (B, D): pooled prompts, whose mean becomes a bias.

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
            raise ValueError(f"{name}: expected {theirs}, as the editor to inherit from has, got {ours}")
    for i, (block, theirs) in enumerate(block_pairs(target, source)):
        (from_double if i < len(source.transformer_blocks) else from_single)(block, theirs)
    _copy(target.img_in, source.x_embedder)
    _copy(target.norm_out, source.norm_out)
    _copy(target.proj_out, source.proj_out)
    ours, theirs = target.time_text_embed, source.time_text_embed
    _copy(ours.timestep_embedder, theirs.timestep_embedder)
    guidance = theirs.time_proj(torch.tensor([1000.0 * GUIDANCE], device=pooled.device))
    constant = theirs.guidance_embedder(guidance)[0] + theirs.text_embedder(pooled).mean(0)
    ours.timestep_embedder.linear_2.bias += constant


def block_pairs(
    target: QwenImageTransformer2DModel, source: FluxTransformer2DModel
) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a target block and the source block that it inherits from."""
    singles = [b for i, b in enumerate(source.single_transformer_blocks) if i != LEFT_OUT]
    return list(zip(target.transformer_blocks, [*source.transformer_blocks, *singles], strict=True))


@torch.no_grad()
def from_double(block: nn.Module, double: nn.Module) -> None:
    """Copy a double-stream block of FLUX into a Qwen block, which then computes the same."""
    _copy(block.img_mod[1], double.norm1.linear)
    _copy(block.txt_mod[1], double.norm1_context.linear)
    _copy(block.attn, double.attn)
    _copy(block.img_mlp, double.ff)
    _copy(block.txt_mlp, double.ff_context)


@torch.no_grad()
def from_single(block: nn.Module, single: nn.Module) -> None:
    """Copy a single-stream block of FLUX into a Qwen block, whose MLP however follows the attention."""
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
def latent_distance(pipe: Any, teacher: Any) -> float:
    """Mean squared distance between a Qwen and a Kontext editor's latents, in units of the latter's variance."""
    images = scenes.draw([scenes.describe(seed) for seed in seeds(0, 8)], 128, 128)[0] * 2 - 1
    theirs = KONTEXT.latents(teacher.vae, images)
    return float(F.mse_loss(family_of(pipe).latents(pipe.vae, images), theirs) / theirs.var())


def copy_latent_statistics(vae: nn.Module, teacher: nn.Module) -> None:
    """Give a Qwen autoencoder that was distilled from `teacher` the teacher's latent statistics, in place."""
    channels = vae.config.z_dim
    vae.register_to_config(
        latents_mean=[teacher.config.shift_factor] * channels,
        latents_std=[1 / teacher.config.scaling_factor] * channels,
    )


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())

"""The released editors' architectures and sizes with random weights, which do not affect speed.

Everything is made on the device itself, in its dtype, from configuration: no download, no copy in host memory. The text
encoders are left out; prompts are given as embeddings of the lengths that they have in use. `tiny` is the same with
small widths, to prove a harness on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

try:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
except ImportError:  # a diffusers without FLUX.2
    Flux2KleinPipeline = None

from specedit.cost.tables import FLUX_SCHEDULER, QWEN_SCHEDULER

T5_TOKENS = 512  # and those of FLUX.2's prompts
# Tokens of instruction and template besides the 1,340 vision tokens of a one-megapixel picture. The negative prompt, a
# single space, is a little shorter.
VL_TOKENS, NEGATIVE_VL_TOKENS = 1400, 1352

FLUX_TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
FLUX_VAE = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    latent_channels=16, norm_num_groups=32, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
    use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
)  # fmt: skip
QWEN_TRANSFORMER = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
KLEIN_TRANSFORMER = dict(
    patch_size=1, in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=7680, axes_dims_rope=(32, 32, 32, 32), guidance_embeds=False,
)  # fmt: skip
QWEN_VAE = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])

TINY_FLUX = dict(
    num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
    pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
TINY_QWEN = dict(
    num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8)
)
TINY_FLUX2 = dict(
    num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
    axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip
TINY_TEXT = 8


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Create parameters of new modules on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def flux_kontext(device: str, dtype: torch.dtype, tiny: bool = False) -> FluxKontextPipeline:
    """FLUX.1-Kontext-dev: 19 double and 38 single blocks, 24 heads of 128, its autoencoder."""
    small = dict(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=1) if tiny else {}
    with made_on(device, dtype):
        transformer = FluxTransformer2DModel(**FLUX_TRANSFORMER | (TINY_FLUX if tiny else {}))
        vae = AutoencoderKL(**FLUX_VAE | small)
    return _pipeline(FluxKontextPipeline, FLUX_SCHEDULER, transformer, vae, "text_encoder_2", "tokenizer_2")


def qwen_image_edit(device: str, dtype: torch.dtype, tiny: bool = False) -> QwenImageEditPipeline:
    """Qwen-Image-Edit: 60 blocks, 24 heads of 128, its autoencoder."""
    small = dict(base_dim=8, num_res_blocks=1) if tiny else {}
    with made_on(device, dtype):
        transformer = QwenImageTransformer2DModel(**QWEN_TRANSFORMER | (TINY_QWEN if tiny else {}))
        vae = AutoencoderKLQwenImage(**QWEN_VAE | small)
    return _pipeline(QwenImageEditPipeline, QWEN_SCHEDULER, transformer, vae, "processor")


def flux2_klein_4b(device: str, dtype: torch.dtype, tiny: bool = False) -> DiffusionPipeline:
    """FLUX.2-klein-4B, which is distilled: 5 double and 20 single blocks, 24 heads of 128, its autoencoder."""
    small = dict(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=1) if tiny else {}
    with made_on(device, dtype):
        transformer = Flux2Transformer2DModel(**KLEIN_TRANSFORMER | (TINY_FLUX2 if tiny else {}))
        vae = AutoencoderKLFlux2(**small)
    return _pipeline(Flux2KleinPipeline, FLUX_SCHEDULER, transformer, vae, is_distilled=True)


def _pipeline(cls: type, scheduler: dict, transformer, vae, *missing: str, **more) -> DiffusionPipeline:
    for part in (transformer, vae):
        part.eval().requires_grad_(False)
    absent = dict.fromkeys(("text_encoder", "tokenizer", *missing))
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler),
        vae=vae,
        transformer=transformer,
        **absent,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


MODELS = {"flux-kontext": flux_kontext, "qwen-image-edit": qwen_image_edit}
if Flux2KleinPipeline is not None:
    MODELS["flux2-klein-4b"] = flux2_klein_4b


def arguments(pipe: DiffusionPipeline, height: int, width: int, batch: int, seed: int = 0) -> dict:
    """One call's arguments without a generator: a noisy picture of the output's size, and embeddings for prompts."""
    config, device, dtype = pipe.transformer.config, pipe.device, pipe.transformer.dtype
    rng = torch.Generator().manual_seed(seed)
    tiny = config.num_layers < 10

    def embedding(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    call = dict(image=Image.fromarray(picture), height=height, width=width)
    if isinstance(pipe, FluxKontextPipeline):
        return call | dict(
            prompt_embeds=embedding(batch, TINY_TEXT if tiny else T5_TOKENS, config.joint_attention_dim),
            pooled_prompt_embeds=embedding(batch, config.pooled_projection_dim),
            max_area=height * width, _auto_resize=False,
        )  # fmt: skip
    if Flux2KleinPipeline is not None and isinstance(pipe, Flux2KleinPipeline):
        tokens = TINY_TEXT if tiny else T5_TOKENS
        return call | dict(prompt_embeds=embedding(batch, tokens, config.joint_attention_dim))
    for prefix, tokens in (("", VL_TOKENS), ("negative_", NEGATIVE_VL_TOKENS)):
        tokens = TINY_TEXT if tiny else tokens
        call[f"{prefix}prompt_embeds"] = embedding(batch, tokens, config.joint_attention_dim)
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(batch, tokens, dtype=torch.long, device=device)
    return call | dict(true_cfg_scale=4.0)


@contextmanager
def conditioned_small(area: int) -> Iterator[None]:
    """Make Qwen-Image-Edit condition on pictures of `area` instead of one megapixel, for tiny runs."""
    stock = pipeline_qwenimage_edit.calculate_dimensions
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: stock(area, ratio)):
        yield

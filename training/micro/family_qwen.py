"""The embedded Qwen editor for the trainer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor, nn

from specedit.micro import editors
from specedit.models.shared.single_frame_vae import SingleFrameConv

from . import build_qwen
from .family import Family

ENDING = 5  # tokens after the prompt, <|im_end|> \n <|im_start|> assistant \n: they attend to all of it


class FlatAutoencoder:
    """AutoencoderKLQwenImage for images (B, 3, H, W) without a time axis.

    The decoder's clamp is left out, since it has no gradient, and convolution taps over zero-padded frames are skipped.
    """

    def __init__(self, vae: nn.Module):
        self.vae = vae

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        with SingleFrameConv():
            moments = self.vae.quant_conv(self.vae.encoder(images[:, :, None]))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments[:, :, 0]))

    def decode(self, latents: Tensor) -> DecoderOutput:
        with SingleFrameConv():
            return DecoderOutput(sample=self.vae.decoder(self.vae.post_quant_conv(latents[:, :, None]))[:, :, 0])


def latents(vae: nn.Module, images: Tensor) -> Tensor:
    mean = FlatAutoencoder(vae).encode(images).latent_dist.mean.float()
    centre, spread = (
        torch.tensor(values, device=mean.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mean - centre) / spread


def set_statistics(vae: nn.Module, latent: Tensor) -> None:
    """Mean and standard deviation of every channel, as the real autoencoder's configuration has them."""
    channels = latent.transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in channels.mean(1).tolist()],
        latents_std=[max(round(v, 4), 1e-3) for v in channels.std(1).tolist()],
    )


def encode_image(pipe: Any, images: Tensor) -> dict[str, Tensor]:
    """`pixel_values` and `image_grid_thw` of images (B, 3, H, W) in 0..1, resized as in the pipeline."""
    pictures = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pipe.processor.encode_images([Image.fromarray(picture) for picture in pictures])


def text(pipe: Any, prompts: list[str], vision: dict[str, Tensor] | None, device: str) -> tuple[Tensor, Tensor]:
    """Prompt features (B, L, D) and mask (B, L) bool, as the pipeline's encode_prompt computes them, with gradients."""
    template = pipe.prompt_template_encode
    if vision is None:
        template = template.replace(pipe.processor.image_token, "")
    inputs = pipe.processor.join([template.format(prompt) for prompt in prompts], vision or {}).to(device)
    start = pipe.prompt_template_encode_start_idx
    hidden = pipe.text_encoder.model(**inputs).last_hidden_state
    return hidden[:, start:], inputs["attention_mask"][:, start:].bool()


def probe_inputs(features: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    """The last `ENDING` tokens (B, ENDING, D) of each prompt."""
    embeds, mask = features
    last = mask.sum(1, keepdim=True) - ENDING + torch.arange(ENDING, device=mask.device)
    return (embeds.gather(1, last[..., None].expand(-1, -1, embeds.shape[2])),)


def velocity(
    pipe: Any, x: Tensor, source: Tensor, grid: tuple[int, int], sigma: Tensor, features: tuple[Tensor, Tensor],
    at: Tensor | None = None, **draw,
) -> Tensor:  # fmt: skip
    embeds, mask = features
    more = {}
    if "txt_seq_lens" in inspect.signature(pipe.transformer.forward).parameters:  # diffusers before 0.37
        more["txt_seq_lens"] = mask.sum(1).tolist()
    with at_tokens(pipe.transformer, grid, at):
        return pipe.transformer(
            hidden_states=torch.cat([x, source], 1),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            timestep=sigma,
            img_shapes=[[(1, *grid), (1, *grid)]] * len(x),
            return_dict=False,
            **more,
        )[0][:, : x.shape[1]]


@contextlib.contextmanager
def at_tokens(transformer: nn.Module, grid: tuple[int, int], at: Tensor | None) -> Iterator[None]:
    """Inside, the transformer gets the positions of the tokens `at` (n,) of target and reference only."""
    if at is None:
        yield
        return
    rows = torch.cat([at, at + math.prod(grid)])
    hook = transformer.pos_embed.register_forward_hook(lambda _module, _inputs, out: (out[0][rows], *out[1:]))
    try:
        yield
    finally:
        hook.remove()


QWEN = Family(
    editor=editors.QWEN,
    build=build_qwen.qwen,
    save=build_qwen.save,
    flat=FlatAutoencoder,
    latents=latents,
    set_statistics=set_statistics,
    text_modules=lambda pipe: [pipe.text_encoder],
    encode_image=encode_image,
    text=text,
    probe_inputs=probe_inputs,
    probe_widths=lambda pipe: (pipe.transformer.config.joint_attention_dim,),
    velocity=velocity,
    probed_blocks=lambda model: tuple(model.transformer_blocks[i] for i in (1, len(model.transformer_blocks) // 2, -2)),
    empty_prompts=0.1,
)

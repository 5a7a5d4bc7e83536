"""The embedded FLUX-Kontext editor for the trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specedit.micro import editors
from specedit.micro.kontext import TEXT_TOKENS

from . import build
from .family import Family


def latents(vae: nn.Module, images: Tensor) -> Tensor:
    mean = vae.encode(images).latent_dist.mean.float()
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def set_statistics(vae: nn.Module, latent: Tensor) -> None:
    vae.register_to_config(
        shift_factor=round(float(latent.mean()), 4), scaling_factor=round(1 / float(latent.std()), 4)
    )


def ids(grid: tuple[int, int], image: int, device: str) -> Tensor:
    """Position ids (N, 3) float32: image index, row, column, as FluxKontextPipeline numbers them."""
    h, w = grid
    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in (h, w))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], -1).reshape(-1, 3)


def text(pipe: Any, prompts: list[str], vision: None, device: str) -> tuple[Tensor, Tensor]:
    """T5's tokens and CLIP's pooled prompt, as FluxKontextPipeline.encode_prompt computes them, with gradients."""
    padded = dict(padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    words = pipe.tokenizer_2(prompts, **padded).input_ids.to(device)
    pooled = pipe.text_encoder(pipe.tokenizer(prompts, **padded).input_ids.to(device)).pooler_output
    return pipe.text_encoder_2(words)[0], pooled


def velocity(
    pipe: Any, x: Tensor, source: Tensor, grid: tuple[int, int], sigma: Tensor, features: tuple[Tensor, Tensor],
    at: Tensor | None = None, **draw,
) -> Tensor:  # fmt: skip
    """The transformer's output (B, N, C) at a distilled guidance drawn from 1 to 5. `draw`: arguments of torch.rand."""
    guidance = 1 + 4 * torch.rand(len(x), **{"device": x.device} | draw)
    return velocity_at(pipe, x, source, grid, sigma, features, guidance.to(x.device), at)


def velocity_at(
    pipe: Any, x: Tensor, source: Tensor, grid: tuple[int, int], sigma: Tensor, features: tuple[Tensor, Tensor],
    guidance: Tensor, at: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The transformer's output (B, N, C) at distilled guidance (B,)."""
    embeds, pooled = features
    places = torch.cat([ids(grid, image, x.device)[... if at is None else at] for image in (0, 1)])
    return pipe.transformer(
        hidden_states=torch.cat([x, source], 1),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=guidance,
        img_ids=places,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
        return_dict=False,
    )[0][:, : x.shape[1]]


KONTEXT = Family(
    editor=editors.KONTEXT,
    build=build.kontext,
    save=build.save,
    flat=lambda vae: vae,
    latents=latents,
    set_statistics=set_statistics,
    text_modules=lambda pipe: [pipe.text_encoder, pipe.text_encoder_2],
    encode_image=lambda pipe, images: None,
    text=text,
    probe_inputs=lambda features: features,
    probe_widths=lambda pipe: (pipe.text_encoder_2.config.d_model, pipe.text_encoder.config.hidden_size),
    velocity=velocity,
    probed_blocks=lambda model: (model.transformer_blocks[-1], *(model.single_transformer_blocks[i] for i in (1, -2))),
)

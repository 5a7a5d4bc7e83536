"""What adapters share whose autoencoder is one for videos: pictures are videos of one frame."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...layout import TokenGrid
from ...method.adapter import EditState
from .block_adapter import BlockAdapter
from .images import decoder_dtype
from .single_frame_vae import single_frame


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents (B, C, 1, h, w) by channel, from the autoencoder's configuration."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(like), std.to(like)


class SingleFrameAdapter(BlockAdapter):
    """Adapters of Qwen's pipelines."""

    encodes_pixels = True

    @staticmethod
    @abstractmethod
    def unpacked(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """Tokens (B, N, C) as normalised latents (B, C, 1, h, w)."""

    def latents_of(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """Tokens (B, N, C) as the decoder's latents (B, C, 1, h, w), in its dtype."""
        latents = self.unpacked(pipe, tokens, grid).to(decoder_dtype(pipe.vae))
        mean, std = latent_statistics(pipe.vae, latents)
        return latents * std + mean

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return tokens.to(state.conditioning.dtype)
        with single_frame(pipe.vae):
            image = pipe.vae.decode(self.latents_of(pipe, tokens, state.grid), return_dict=False)[0][:, :, 0]
        return pipe.image_processor.postprocess(image, output_type=output_type)

    def encode(self, pipe: Any, pictures: Tensor, grid: TokenGrid) -> Tensor:
        with single_frame(pipe.vae):
            return grid.geometry.from_image(self.encoded(pipe, pictures.unsqueeze(2))[:, :, 0])

"""Qwen-Image-Edit inpainting: an edit whose call says itself what may change."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageEditInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ...method.schedule import stretched_sigmas
from ..registry import register_adapter
from ..shared.block_adapter import pixels_per_token
from ..shared.devices import execution_device
from ..shared.images import check_pictures
from ..shared.inpainting import Inpainting
from ..shared.single_frame_adapter import latent_statistics
from .edit import QwenImageEdit
from .sizes import Pictures, picture_size


@register_adapter
class QwenImageEditInpaint(Inpainting, QwenImageEdit):
    """Adapter of QwenImageEditInpaintPipeline."""

    name = "qwen-image-edit-inpaint"
    pipelines = "QwenImageEditInpaintPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, QwenImageEditInpaintPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if call["latents"] is not None:
            raise ValueError("latents: expected None, because the stock pipeline fails with given ones, got some")
        return super().refusal(pipe, call, attention)

    def inpainted_size(self, pipe: Any, call: dict[str, Any]) -> tuple[int, int]:
        return self._output_size(pipe, call, check_pictures(call["image"]), pixels_per_token(pipe))

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], images: list[Image.Image], multiple: int) -> tuple[int, int]:
        """The picture's own, whatever `height` and `width` say."""
        width, height = picture_size(pipe, images[0])
        return height // multiple * multiple, width // multiple * multiple

    def sigmas(self, pipe: Any, tokens: int, start: float, end: float, steps: int) -> Tensor:
        return stretched_sigmas(pipe.scheduler, tokens, start, end, steps)

    @staticmethod
    def _latents(
        pipe: Any, call: dict[str, Any], pictures: Pictures, shape: tuple[int, int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The pipeline's own method adds the picture to the noise. Here it is the sampler that does."""
        batch, height, width = shape
        device, dtype, channels = like.device, like.dtype, pipe.transformer.config.in_channels // 4
        (picture,) = pictures.reference
        encoded = pipe._encode_vae_image(image=picture.to(device, dtype), generator=call["generator"])
        encoded = encoded.repeat(batch // len(encoded), 1, 1, 1, 1).transpose(1, 2)  # the generator's first draw
        noise = randn_tensor(
            (batch, 1, channels, *encoded.shape[-2:]), generator=call["generator"], device=device, dtype=dtype
        )
        packed = [pipe._pack_latents(one, batch, channels, *encoded.shape[-2:]) for one in (noise, encoded.to(dtype))]
        return packed[0], packed[1]

    @staticmethod
    def encoded(pipe: Any, pictures: Tensor) -> Tensor:
        """The most likely latents, where the pipeline's own method draws some."""
        device = execution_device(pipe, pictures.device)
        latents = pipe.vae.encode((2 * pictures - 1).to(device, pipe.vae.dtype)).latent_dist.mode()
        mean, std = latent_statistics(pipe.vae, latents)
        return ((latents - mean) / std).float()

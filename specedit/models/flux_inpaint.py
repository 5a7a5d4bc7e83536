"""FLUX.1-Kontext inpainting: an edit whose call says itself what may change."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxKontextInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .flux import FluxKontext, reference_size
from .registry import register_adapter
from .shared.block_adapter import pixels_per_token
from .shared.images import is_latents
from .shared.inpainting import Inpainting


@register_adapter
class FluxKontextInpaint(Inpainting, FluxKontext):
    """Adapter of FluxKontextInpaintPipeline."""

    name = "flux-kontext-inpaint"
    pipelines = "FluxKontextInpaintPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, FluxKontextInpaintPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if is_latents(pipe, call["image"]):
            return "image holds latents, which the stock pipeline refuses"
        return super().refusal(pipe, call, attention)

    def inpainted_size(self, pipe: Any, call: dict[str, Any]) -> tuple[int, int]:
        return self._output_size(pipe, call, pixels_per_token(pipe))

    @staticmethod
    def size_checks(call: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        more = ("image", "mask_image", "strength", "output_type", "padding_mask_crop")
        return dict(height=height, width=width, **{name: call[name] for name in more})

    @staticmethod
    def noise_and_reference(
        pipe: Any, call: dict[str, Any], image: Tensor, batch: int, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        channels, device, side = pipe.transformer.config.in_channels // 4, image.device, pixels_per_token(pipe)
        noise = call["latents"]
        if noise is None:  # encoding draws nothing
            shape = (batch, channels, *(2 * (n // side) for n in size))
            noise = randn_tensor(shape, generator=call["generator"], device=device, dtype=dtype)
        # Given noise, the pipeline adds no picture to it; the sampler does.
        packed = pipe.prepare_latents(
            image.float(), None, batch, channels, *size, dtype, device, call["generator"], noise
        )
        return packed[0], packed[1]

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[int, int]:
        """The picture's own, whatever `height` and `width` say."""
        return reference_size(pipe, call, multiple)

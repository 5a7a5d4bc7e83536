"""FLUX.1-Kontext inpainting: an edit whose call says itself what may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxKontextInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import SpecEditConfig
from ..method.adapter import EditState
from ..method.restore import blend
from .flux import FluxConditioning, FluxKontext, reference_size
from .registry import register_adapter
from .shared import inpainting
from .shared.block_adapter import pixels_per_token
from .shared.images import is_latents


@dataclass(kw_only=True)
class InpaintConditioning(FluxConditioning):
    """weights: (B, N, C), 1 where the mask lets tokens change."""

    weights: Tensor


@register_adapter
class FluxKontextInpaint(FluxKontext):
    """Adapter of FluxKontextInpaintPipeline.

    There is no draft: the cells under `mask_image` are expanded, all others locked. In the end, latents outside the
    mask are the picture's, as the stock pipeline leaves them.
    """

    name = "flux-kontext-inpaint"
    pipelines = "FluxKontextInpaintPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, FluxKontextInpaintPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if (reason := inpainting.refusal(call)) is not None:
            return reason
        if is_latents(pipe, call["image"]):
            return "image holds latents, which the stock pipeline refuses"
        if (reason := super().refusal(pipe, call, attention)) is not None:
            return reason
        edits = self.own_mask(pipe, call).flatten(1).any(1)
        return None if bool(edits.all()) else "mask_image is empty"

    def own_mask(self, pipe: Any, call: dict[str, Any]) -> Tensor:
        return inpainting.mask_pixels(pipe, call, self._output_size(pipe, call, pixels_per_token(pipe)))

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        state = super().prepare(pipe, call, config)
        mask = self.own_mask(pipe, call).to(state.device)
        weights = inpainting.mask_tokens(mask, state.grid, state.noise)
        state.conditioning = InpaintConditioning(**vars(state.conditioning), weights=weights)
        return state

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        conditioning = state.conditioning
        if isinstance(conditioning, InpaintConditioning):
            tokens = blend(tokens, state.aligned.to(tokens), conditioning.weights.to(tokens))
        return super().decode(pipe, state, tokens, output_type)

    @staticmethod
    def size_checks(call: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        more = ("image", "mask_image", "strength", "output_type", "padding_mask_crop")
        return dict(height=height, width=width, **{name: call[name] for name in more})

    @staticmethod
    def noise_and_reference(
        pipe: Any, call: dict[str, Any], image: Tensor, batch: int, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        channels, device, side = (
            pipe.transformer.config.in_channels // 4,
            pipe._execution_device,
            pixels_per_token(pipe),
        )
        noise = call["latents"]
        if noise is None:  # at strength 1 the stock pipeline starts from it as it is; encoding draws nothing
            shape = (batch, channels, *(2 * (n // side) for n in size))
            noise = randn_tensor(shape, generator=call["generator"], device=device, dtype=dtype)
        packed = pipe.prepare_latents(
            image.float(), None, batch, channels, *size, dtype, device, call["generator"], noise
        )
        return packed[0], packed[1]

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[int, int]:
        """The picture's own, whatever `height` and `width` say."""
        return reference_size(pipe, call, multiple)

"""FLUX.2-klein inpainting: an edit whose call says itself what may change."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ...layout import TokenGrid
from ..registry import register_adapter
from ..shared.block_adapter import pixels_per_token
from ..shared.images import given_list
from ..shared.inpainting import UNSUPPORTED, Inpainting
from ..shared.shapes import Shape, whole
from . import pictures
from .klein import Flux2Klein


@register_adapter
class Flux2KleinInpaint(Inpainting, Flux2Klein):
    """Adapter of Flux2KleinInpaintPipeline. `image_reference` is a second reference; several images are a batch."""

    name = "flux2-klein-inpaint"
    pipelines = "Flux2KleinInpaintPipeline"
    unsupported: ClassVar[dict[str, str]] = {
        name: reason for name, reason in UNSUPPORTED.items() if name != "image_reference"
    }

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, Flux2KleinInpaintPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        images, reference = given_list(call["image"]), call["image_reference"]
        if call["image"] is not None and not all(isinstance(image, Image.Image) for image in images):
            return "image is no PIL picture"
        if reference is not None and not isinstance(reference, Image.Image):
            return "image_reference is no PIL picture"
        return super().refusal(pipe, call, attention)

    def inpainted_size(self, pipe: Any, call: dict[str, Any]) -> tuple[int, int]:
        """The first picture's, down to whole tokens. Only one that is alone is brought to 1 MP."""
        first = given_list(call["image"])[0]
        if call["image"] is first:
            return pictures.taken_size(pipe, first)
        return whole(Shape(*first.size), pixels_per_token(pipe))

    def output_size(self, pipe: Any, call: dict[str, Any], taken: tuple[int, int]) -> tuple[int, int]:
        return self.inpainted_size(pipe, call)

    def taken_pictures(self, pipe: Any, call: dict[str, Any]) -> pictures.Taken:
        processor, images = pipe.image_processor, given_list(call["image"])
        if call["image"] is images[0] and (area := images[0].width * images[0].height) > pictures.MOST_PIXELS:
            scale = (pictures.MOST_PIXELS / area) ** 0.5
            images = [processor.resize(images[0], *(int(side * scale) for side in images[0].size[::-1]))]
        size = self.inpainted_size(pipe, call)
        edited = [processor.convert_to_rgb(processor.resize(image, *size)) for image in images]
        reference = call["image_reference"]
        return edited, [] if reference is None else [pictures.taken_picture(pipe, reference)]

    def noise_and_references(
        self, pipe: Any, call: dict[str, Any], taken: pictures.Taken, shape: tuple[int, int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        (batch, height, width), side = shape, pixels_per_token(pipe)
        device, dtype = like.device, like.dtype
        channels, noise = pipe.transformer.config.in_channels, call["latents"]
        if noise is None:  # encoding draws nothing
            grid = (height // side, width // side)
            noise = randn_tensor((batch, channels, *grid), generator=call["generator"], device=device, dtype=dtype)
        image = torch.cat([pictures.model_input(pipe, picture) for picture in taken[0]])
        # Given noise, the pipeline adds no picture to it; the sampler does.
        packed, _, _, encoded, _ = pipe.prepare_latents(
            image, None, batch, channels // 4, height, width, dtype, device, call["generator"], noise
        )
        references = [encoded, *(pictures.model_input(pipe, picture) for picture in taken[1])]
        reference, _ = pipe.prepare_image_latents(references, batch, call["generator"], device, dtype)
        return packed, reference

    @staticmethod
    def mask_weights(mask: Tensor, grid: TokenGrid, like: Tensor) -> Tensor:
        """Between 0 and 1 at the mask's edges, by the stock pipeline's rule."""
        weights = F.interpolate(mask, size=grid.shape, mode="bilinear")
        return weights.flatten(2).transpose(1, 2).expand_as(like).to(like)

"""Calls of inpainting pipelines: their own mask is the edit mask, and what it leaves stays the picture's latents."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...checks import share
from ...config import SpecEditConfig
from ...field_checks import first_step
from ...layout import TokenGrid
from ...method.adapter import EditState
from ...method.restore import blend, token_weights
from .block_adapter import BlockAdapter
from .prompts import count_prompts

OWN_MASK = "own_mask"  # where a call keeps its mask once it is read
# Arguments of some of these pipelines that need the stock call, and why.
UNSUPPORTED = {
    "padding_mask_crop": "edits a crop of the picture",
    "masked_image_latents": "are read by the stock call alone",
    "image_reference": "is another picture than the one that is kept",
}


class Inpainting(BlockAdapter):
    """What adapters of inpainting pipelines share; it comes before the adapter of the family's editing pipeline.

    There is no draft: the cells under `mask_image` are expanded, all others locked. With a strength below 1 the run
    begins with the noised picture, as in the stock pipeline. In the end, latents outside the mask are the picture's.
    """

    unsupported = UNSUPPORTED

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if call["mask_image"] is None:
            return "there is no mask_image"
        for name, reason in self.unsupported.items():
            if call.get(name) is not None:
                return f"{name} {reason}"
        strength = share("strength", call["strength"])
        if strength < 1 and call["latents"] is not None:
            return f"latents with strength={strength} are taken for the noised picture"
        if (reason := super().refusal(pipe, call, attention)) is not None:
            return reason
        edits = self.own_mask(pipe, call).flatten(1).any(1)
        return None if bool(edits.all()) else "mask_image is empty"

    def strength(self, call: dict[str, Any]) -> float:
        return float(call["strength"])

    def own_mask(self, pipe: Any, call: dict[str, Any]) -> Tensor:
        """`mask_image` as the pipeline reads it, (B, 1, H, W) float32 of zeros and ones, at the output's (H, W).

        Read once a call, which keeps it. Several masks are tiled over the images that the call makes, as in the stock
        pipelines.
        """
        if OWN_MASK not in call:
            height, width = self.inpainted_size(pipe, call)
            mask = pipe.mask_processor.preprocess(call["mask_image"], height=height, width=width).float()
            batch = count_prompts(call) * call["num_images_per_prompt"]
            call[OWN_MASK] = mask if batch % len(mask) else mask.repeat(batch // len(mask), 1, 1, 1)
        return call[OWN_MASK]  # type: ignore[no-any-return]

    def inpainted_size(self, pipe: Any, call: dict[str, Any]) -> tuple[int, int]:
        """Height and width of the output: the picture's."""
        raise NotImplementedError

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        state = super().prepare(pipe, call, config)
        mask = self.own_mask(pipe, call).to(state.device)
        state.conditioning.weights = self.mask_weights(mask, state.grid, state.noise)
        steps = call["num_inference_steps"]
        sigmas = self.sigmas(pipe, state.grid.tokens, 1.0, 0.0, steps)
        state.start = float(sigmas[first_step(steps, self.strength(call))])
        return state

    @staticmethod
    def mask_weights(mask: Tensor, grid: TokenGrid, like: Tensor) -> Tensor:
        """`own_mask` as weights of tokens (B, N, C), by nearest latent pixels as in the stock pipelines."""
        patch = grid.geometry.patch
        h, w = grid.shape
        latent = F.interpolate(mask, size=(patch * h, patch * w))
        return token_weights(latent[:, 0], grid, like).to(like)

    def finish(self, state: EditState, tokens: Tensor) -> Tensor:
        weights = state.conditioning.weights
        return blend(tokens, state.aligned.to(tokens), weights.to(tokens))

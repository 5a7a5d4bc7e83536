"""Calls of inpainting pipelines: their own mask is the edit mask, and what it leaves stays the picture's latents."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...layout import TokenGrid
from ...method.restore import token_weights
from .prompts import count_prompts


def refusal(call: dict[str, Any]) -> str | None:
    """Why such a call runs the stock pipeline, or None."""
    if call["mask_image"] is None:
        return "there is no mask_image"
    if call["strength"] != 1:
        return f"strength={call['strength']} starts from the picture, and SpecEdit from noise; it takes strength=1"
    if call.get("image_reference") is not None:
        return "image_reference is another picture than the one that is kept"
    if call.get("padding_mask_crop") is not None:
        return "padding_mask_crop edits a crop of the picture"
    return None


def mask_pixels(pipe: Any, call: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """`mask_image` as the pipeline reads it, (B, 1, H, W) float32 of zeros and ones, at the output's (H, W).

    Several masks are tiled over the images that the call makes, as in the stock pipelines.
    """
    mask: Tensor = pipe.mask_processor.preprocess(call["mask_image"], height=size[0], width=size[1])
    batch = count_prompts(call) * call["num_images_per_prompt"]
    return mask.float() if batch % len(mask) else mask.float().repeat(batch // len(mask), 1, 1, 1)


def mask_tokens(mask: Tensor, grid: TokenGrid, like: Tensor) -> Tensor:
    """`mask_pixels` as weights of tokens (B, N, C), by nearest latent pixels as in the stock pipelines."""
    patch = grid.geometry.patch
    h, w = grid.shape
    latent = F.interpolate(mask, size=(patch * h, patch * w))
    return token_weights(latent[:, 0], grid, like).to(like)

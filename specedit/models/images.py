"""Pictures as every adapter takes them, and the decoder features that verification compares."""

from __future__ import annotations

from typing import Any

import numpy as np
from accelerate.hooks import CpuOffload
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

SMALLEST = 64  # px a side: four tokens, one of the draft's


def check_image(image: Any) -> tuple[int, int]:
    """Height and width of `image`; ValueError or TypeError unless it is an RGB picture of a usable size."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f'image: expected an RGB picture, got mode {image.mode!r}; use image.convert("RGB")')
        width, height = image.size
    elif isinstance(image, (np.ndarray, Tensor)):
        shape, array = tuple(image.shape), isinstance(image, np.ndarray)
        if len(shape) not in (3, 4) or shape[-1 if array else -3] != 3:
            layout = "(H, W, 3)" if array else "(3, H, W)"
            raise ValueError(f"image: expected {layout}, with or without a batch in front, got {shape}")
        if "float" not in str(image.dtype):
            raise TypeError(f"image: expected floating point values in 0..1, got {image.dtype}")
        height, width = shape[-3:-1] if array else shape[-2:]
        if min(height, width) and not (image.min() >= -2 and image.max() <= 2):  # sharpened ones reach beyond 1
            low, high = float(image.min()), float(image.max())
            raise ValueError(f"image: expected floating point values in 0..1, got values from {low:g} to {high:g}")
    else:
        raise TypeError(f"image: expected a PIL image, array or tensor, got {type(image).__name__}")
    if min(height, width) < SMALLEST:
        raise ValueError(f"image: expected at least {SMALLEST} px a side, got {width} x {height}")
    return height, width


def check_pictures(image: Any) -> list[Image.Image]:
    """The pictures of a call; TypeError or ValueError unless they are RGB pictures, at least one."""
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("image: expected at least one picture, got an empty list")
    for one in images:
        if not isinstance(one, Image.Image):  # the stock pipelines ask every picture for its `size`
            raise TypeError(f"image: expected a PIL image or a list of them, got {type(one).__name__}")
        check_image(one)
    return images


def batched(image: Any) -> Any:
    """A single array or tensor with the batch axis that diffusers' image processor expects."""
    return image[None] if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 3 else image


def source_pictures(pipe: Any, image: Any, height: int, width: int) -> Tensor:
    """The input pictures (n, 3, H, W) in 0..1 at the size that the model takes them, resized as the pipeline does."""
    # Not the model's input scaled back: that would round, and keep_pixels returns these very values.
    plain = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor * 2, do_normalize=False)
    image = plain.preprocess(plain.resize(batched(image), height, width), height, width).float()
    return (image / 2 + 0.5 if image.min() < 0 else image).clamp(0, 1)


def check_decoder(vae: Any) -> None:
    """ValueError of a decoder without the layers of `decoder_features`, as that of AutoencoderTiny."""
    if not all(hasattr(vae.decoder, part) for part in ("conv_in", "mid_block", "up_blocks")):
        raise ValueError(
            f"vae: expected a decoder with conv_in, mid_block and up_blocks to verify the draft with, got "
            f"{type(vae).__name__}; selector='variance' or an edit_mask needs none"
        )


def decoder_features(vae: Any, latents: Tensor) -> list[Tensor]:
    """What the decoder's conv_in, mid_block and first up block make of latents: the layers of eq. 6."""
    if isinstance(getattr(vae, "_hf_hook", None), CpuOffload):
        vae.to(latents.device)  # its hook would first take the transformer away, which the next step needs again
    elif hasattr(vae, "_hf_hook") or hasattr(vae.decoder, "_diffusers_hook"):
        return _hooked_features(vae, latents)
    if getattr(vae, "post_quant_conv", None) is not None:
        latents = vae.post_quant_conv(latents)
    first = vae.decoder.conv_in(latents)
    middle = vae.decoder.mid_block(first)
    return [first, middle, vae.decoder.up_blocks[0](middle)]


def _hooked_features(vae: Any, latents: Tensor) -> list[Tensor]:
    """The same features of an offloaded autoencoder: only a whole decode brings every weight to the device.

    Whole means neither in tiles nor sample by sample, of which only the last would be seen.
    """
    parted = {name: getattr(vae, name) for name in ("use_tiling", "use_slicing") if hasattr(vae, name)}
    seen: dict[str, Tensor] = {}
    parts = {"conv_in": vae.decoder.conv_in, "mid_block": vae.decoder.mid_block, "up": vae.decoder.up_blocks[0]}
    hooks = [
        part.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
        for name, part in parts.items()
    ]
    try:
        for name in parted:
            setattr(vae, name, False)
        vae.decode(latents, return_dict=False)
    finally:
        for name, value in parted.items():
            setattr(vae, name, value)
        for hook in hooks:
            hook.remove()
    return list(seen.values())

"""Pictures as every adapter takes them, and the decoder features that verification compares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

FEWEST = 4  # tokens a side of a picture that can be drafted: one of the draft's, at its default scale
# What to do about pictures that the stock pipelines fail on, or take for something else.
CURES = {
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "F"), 'scale it to 8 bits, then use convert("RGB")'),
    **dict.fromkeys(("RGBA", "LA", "PA"), 'composite it on a background, then use convert("RGB")'),
    "LAB": "use ImageCms.profileToProfile, with createProfile of LAB and sRGB",
}


def check_image(image: Any) -> tuple[int, int]:
    """Height and width of `image`; ValueError or TypeError unless it is an RGB picture."""
    size = check_kind(image)
    if not isinstance(image, Image.Image) and not (image.min() >= -2 and image.max() <= 2):  # sharpened ones pass 1
        low, high = float(image.min()), float(image.max())
        raise ValueError(f"image: expected floating point values in 0..1, got values from {low:g} to {high:g}")
    return size


def check_kind(image: Any) -> tuple[int, int]:
    """What `check_image` checks without reading the values, for which a GPU would have to be waited for."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            cure = CURES.get(image.mode, 'use image.convert("RGB")')
            raise ValueError(f"image: expected an RGB picture, got mode {image.mode!r}; {cure}")
        height, width = image.height, image.width
    elif isinstance(image, (np.ndarray, Tensor)):
        height, width = _array_size(image)
    else:
        raise TypeError(f"image: expected a PIL image, array or tensor, got {type(image).__name__}")
    if min(height, width) < 1:
        raise ValueError(f"image: expected at least 1 px a side, got {width} x {height}")
    return height, width


def _array_size(image: np.ndarray | Tensor) -> tuple[int, int]:
    shape, array = tuple(image.shape), isinstance(image, np.ndarray)
    if len(shape) not in (3, 4) or shape[-1 if array else -3] != 3:
        layout = "(H, W, 3)" if array else "(3, H, W)"
        raise ValueError(f"image: expected {layout}, with or without a batch in front, got {shape}")
    if not array and (image.layout is not torch.strided or image.is_meta):
        kind = "a meta tensor" if image.is_meta else f"a tensor of layout {image.layout}"
        raise TypeError(f"image: expected a dense tensor with values, got {kind}")
    dtype = str(image.dtype)
    if "float" not in dtype or "float8" in dtype:
        cure = "; as floats, divide them by 255" if dtype.endswith("uint8") else ""
        raise TypeError(f"image: expected floating point values in 0..1, got {dtype}{cure}")
    return shape[-3:-1] if array else shape[-2:]


def is_latents(pipe: Any, image: Any) -> bool:
    """Whether `image` is what the autoencoder made of pictures, (B, c, h, w)."""
    return isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == pipe.latent_channels


def too_small(sizes: Iterable[tuple[int, int]], multiple: int) -> str | None:
    """Why pictures of these heights and widths run stock, or None. `multiple`: px a token."""
    if min(min(size) for size in sizes) // multiple >= FEWEST:
        return None
    return f"a picture with fewer than {FEWEST} tokens a side, {FEWEST * multiple} px, is too small to be halved twice"


def pictures_of(image: Any, values: bool = False) -> list[Image.Image | np.ndarray | Tensor]:
    """The pictures of a call, one entry each: an array or tensor with a batch axis holds several.

    values: whether to check their values too, for which a GPU must be waited for.

    Raises:
        TypeError, ValueError: something else than RGB pictures, or an empty list.
    """
    images = given_list(image)
    for one in images:
        (check_image if values else check_kind)(one)
    return [picture for one in images for picture in (one if getattr(one, "ndim", 3) == 4 else [one])]


def given_list(image: Any) -> list[Any]:
    """What was given, as a list; ValueError for an empty one."""
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("image: expected at least one picture, got an empty list")
    return images


def check_pictures(image: Any) -> list[Image.Image]:
    """The pictures of a call; TypeError or ValueError unless they are RGB PIL images, at least one."""
    images = given_list(image)
    for one in images:
        if not isinstance(one, Image.Image):  # the stock pipelines ask every picture for its `size`
            raise TypeError(f"image: expected a PIL image or a list of them, got {type(one).__name__}")
        check_image(one)
    return images


def source_pictures(pipe: Any, pictures: list[Any], height: int, width: int) -> Tensor:
    """The input pictures (n, 3, H, W) in 0..1 at the size that the model takes them, resized as the pipeline does."""
    # Not the model's input scaled back: that would round, and keep_pixels returns these very values.
    plain = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor * 2, do_normalize=False)
    image = plain.preprocess(pictures, height, width).float()
    return (image / 2 + 0.5 if image.min() < 0 else image).clamp(0, 1)


def check_decoder(vae: Any) -> None:
    """ValueError of a decoder without the layers of `decoder_features`, as that of AutoencoderTiny."""
    if not all(hasattr(vae.decoder, part) for part in ("conv_in", "mid_block", "up_blocks")):
        raise ValueError(
            f"vae: expected a decoder with conv_in, mid_block and up_blocks to verify the draft with, got "
            f"{type(vae).__name__}; selector='variance' or an edit_mask needs none"
        )


def decoder_dtype(vae: Any) -> torch.dtype:
    """`vae.dtype`, which looks at every module, unless the decoder's first layer says it."""
    first = getattr(vae.decoder, "conv_in", None)
    weight = getattr(first, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(first, "_diffusers_hook"):
        return vae.dtype
    return weight.dtype


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

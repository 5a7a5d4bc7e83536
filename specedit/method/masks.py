"""A caller's `edit_mask`, of whatever kind, as the pixels to edit and then as the cells that hold one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..once import warn_caller
from ..placement import picture_cells
from .adapter import EditState

SHAPES = "(H, W), (B, H, W), (B, 1, H, W), or with 1 to 4 channels (H, W, C) or (B, H, W, C)"
NUMBERS = ("1", "L", "I", "F")  # modes whose pixels are numbers, besides the 16-bit ones
BRUSHES = ("LA", "RGBA")


def read(mask: Any, batch: int = 1) -> list[Tensor]:
    """The pixels to edit of one or several masks, each (H, W) bool on the CPU.

    mask: PIL image, array or tensor, or a list of them. Zero keeps, anything above zero edits.

    - Arrays and tensors: (H, W), (B, H, W) or (B, 1, H, W), bool, integer or float; or channels last, (H, W, C) or
      (B, H, W, C), where any nonzero channel edits. The first axis of three counts masks where it is 1 or divides
      `batch`, or where the second axis is at most 4; otherwise a last axis of 1 to 4 holds channels. Masked entries of
      a numpy masked array are kept.
    - Pictures of any mode are converted to what they look like first: a palette looks up its colours, CMYK, YCbCr, LAB
      and HSV become RGB, and black keeps. "1", "L", "I", "I;16" and "F" are numbers as they are.
    - With alpha (LA or RGBA pictures, 2 or 4 channels) a mask is a brush layer: a pixel is edited where alpha is above
      zero, whatever its colour, black included. Where alpha is the same nonzero value everywhere it says nothing, and
      the colours decide.

    A float mask that edits every pixel although its values vary gets one warning with its range.

    Raises:
        TypeError: another type, or a dtype that holds no real numbers.
        ValueError: another shape, an empty one, negative values, NaN or infinity, or a mask without a nonzero pixel.
    """
    several = isinstance(mask, (list, tuple))
    read_each = [_read(one, 1 if several else batch) for one in (mask if several else [mask])]
    spans = [span for _, span in read_each if span is not None]
    if spans:
        low, high = min(low for low, _ in spans), max(high for _, high in spans)
        warn_caller(
            f"edit_mask: no value is zero, so every pixel is edited; values go from {low:g} to {high:g}. Zero keeps, "
            "anything above zero edits; of a soft mask pass mask > 0.5"
        )
    return [pixels for each, _ in read_each for pixels in each]


def cells_of_mask(mask: Any, state: EditState) -> Tensor:
    """Edited cells (B, cells_h, cells_w) bool of a mask as `read` takes it: cells that overlap a pixel to edit.

    One mask serves all samples; several are one for each sample, picture or prompt.

    Raises:
        TypeError, ValueError: as `read`, or another number of masks.
    """
    masks = read(mask, state.batch)
    count, batch = len(masks), state.batch
    if count not in (1, batch, state.pictures, state.prompts):
        raise wrong_count(masks, batch, state.prompts, state.pictures)
    cells = torch.cat([picture_cells(one[None].float().to(state.device), state.placement) for one in masks])
    if not bool(cells.flatten(1).any(1).all()):
        raise ValueError("edit_mask: expected nonzero pixels on the output, got all of them where it is cropped")
    if count in (1, batch, state.pictures):  # pictures are tiled over the batch, images of a prompt stand together
        return cells.repeat(batch // count, 1, 1)
    return cells.repeat_interleave(batch // count, 0)


def wrong_count(masks: list[Tensor], batch: int, prompts: int, pictures: int) -> ValueError:
    """The error for a number of masks that does not fit a batch."""
    several = (("picture", pictures), ("prompt", prompts))
    each = [f"{n}, one for each {what}" for what, n in several if 1 < n < batch]
    wanted = " or ".join(["1 mask", *each, *([f"{batch}, one for each image"] if batch > 1 else [])])
    hint = "; the channels of a colour mask are its last axis" if len(masks) in (3, 4) else ""
    return ValueError(f"edit_mask: expected {wanted}, got {len(masks)}{hint}")


def _read(mask: Any, batch: int) -> tuple[list[Tensor], tuple[float, float] | None]:
    """The pixels of one mask or of a batch, and the range of a float one that should be warned about."""
    values, alpha = _picture(mask) if isinstance(mask, Image.Image) else (_array(mask), None)
    samples = _samples(values, batch, alpha)
    _check_values(samples)
    pixels = [_pixels(one) for one in samples]
    if not all(one.any() for one in pixels):
        raise ValueError("edit_mask: expected some nonzero pixels, got an empty mask; there would be nothing to edit")
    soft = [o for o, p in zip(samples, pixels, strict=True) if o.dtype.kind == "f" and p.all() and (o != o[0, 0]).any()]
    span = (float(min(o.min() for o in soft)), float(max(o.max() for o in soft))) if soft else None
    return [torch.from_numpy(one) for one in pixels], span


def _picture(picture: Image.Image) -> tuple[np.ndarray, bool]:
    """Values (H, W) or (H, W, C) of what a picture looks like, and whether they have channels."""
    mode = picture.mode
    if mode in ("P", "PA", "RGBa") or (mode in ("1", "L", "RGB") and "transparency" in picture.info):
        picture = picture.convert("RGBA")
    elif mode == "La":
        picture = picture.convert("LA")
    elif mode == "LAB":
        picture = picture.getchannel("L")  # conversion to RGB rounds black to (1, 0, 1)
    elif mode not in NUMBERS and mode not in BRUSHES and mode != "RGB" and not mode.startswith("I;16"):
        picture = picture.convert("RGB")
    return np.array(picture), picture.mode in (*BRUSHES, "RGB")


def _array(mask: Any) -> np.ndarray:
    """The numbers of an array or tensor, as numpy has them."""
    if isinstance(mask, Tensor):
        return _tensor_values(mask)
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"edit_mask: expected a PIL image, array or tensor, got {type(mask).__name__}")
    if mask.dtype.kind not in "biuf":
        raise TypeError(f"edit_mask: expected an array of numbers or booleans, got dtype {mask.dtype}")
    return mask.filled(0) if isinstance(mask, np.ma.MaskedArray) else np.asarray(mask)


def _tensor_values(mask: Tensor) -> np.ndarray:
    if mask.is_meta:
        raise ValueError("edit_mask: expected a tensor with values, got one on the meta device")
    if mask.is_nested or mask.is_quantized or mask.layout != torch.strided:
        kind = "nested" if mask.is_nested else "quantized" if mask.is_quantized else mask.layout
        raise TypeError(f"edit_mask: expected a dense tensor, got a tensor that is {kind}")
    if mask.is_complex():
        raise TypeError(f"edit_mask: expected a tensor of numbers or booleans, got {mask.dtype}")
    mask = mask.detach().cpu()
    if mask.is_floating_point() and mask.dtype not in (torch.float32, torch.float64):
        mask = mask.float()  # numpy knows neither bfloat16 nor float8
    return mask.resolve_neg().numpy()


def _samples(values: np.ndarray, batch: int, picture: bool | None) -> list[np.ndarray]:
    """Each mask as (H, W) or (H, W, C), by the rules that `read` documents. picture: whether a PIL one has channels."""
    shape = values.shape
    if values.size and (values.ndim == 2 or picture):
        return [values]
    if values.size and values.ndim == 3:
        counted = batch % shape[0] == 0 or shape[1] <= 4
        return [values] if not counted and 1 <= shape[2] <= 4 else list(values)
    if values.size and values.ndim == 4 and shape[1] == 1:
        return list(values[:, 0])
    if values.size and values.ndim == 4 and shape[3] <= 4:
        return list(values)
    raise ValueError(f"edit_mask: expected {SHAPES}, got {shape}")


def _check_values(samples: list[np.ndarray]) -> None:
    low, high = (float(pick([pick(one) for one in samples])) for pick in (np.min, np.max))
    if not np.isfinite([low, high]).all():
        raise ValueError("edit_mask: expected finite values, got NaN or infinity")
    if low < 0:
        raise ValueError(
            f"edit_mask: expected zero where the picture is kept and values above zero where it is edited, got values "
            f"from {low:g} to {high:g}; of logits pass mask > 0"
        )


def _pixels(values: np.ndarray) -> np.ndarray:
    """(H, W) bool of one mask (H, W) or (H, W, C)."""
    nonzero: np.ndarray = values != 0
    if values.ndim == 2:
        return nonzero
    if values.shape[2] in (1, 3):
        return np.asarray(nonzero.any(-1))
    alpha = values[..., -1]
    flat = alpha[0, 0] != 0 and (alpha == alpha[0, 0]).all()
    return np.asarray(nonzero[..., :-1].any(-1) if flat else nonzero[..., -1])

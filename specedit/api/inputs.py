"""What is checked of every call before any work, whatever the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Generator, Tensor

from ..config import SpecEditConfig
from ..method import masks
from ..method.adapter import Adapter
from ..models.shared.prompts import count_prompts


def mask_of(adapter: Adapter, pipe: Any, call: dict[str, Any], edit_mask: Any, config: SpecEditConfig) -> Any:
    """The caller's mask, or that of an inpainting pipeline's own argument.

    None where a method edits the whole picture, of which an inpainting pipeline keeps what its mask leaves.

    Raises:
        ValueError: both were given.
    """
    own = adapter.own_mask(pipe, call)
    if own is None:
        return edit_mask
    if edit_mask is not None:
        raise ValueError(
            f"edit_mask: expected none beside mask_image, which says what may change, got {type(edit_mask).__name__}"
        )
    return own if _takes_mask(config) else None


def _takes_mask(config: SpecEditConfig) -> bool:
    method = config.method_options
    return method is None or method.takes_mask or config.keep_pixels


INTEGERS = frozenset((
    "height", "width", "max_area", "num_images_per_prompt", "max_sequence_length"
))  # fmt: skip
NUMBERS = frozenset(("guidance_scale", "true_cfg_scale", "strength"))


def check_types(call: dict[str, Any], optional: Collection[str]) -> None:
    """TypeError for arguments of a wrong type that the pipelines find late or in a stranger's words.

    optional: names of arguments that may be None.
    """
    for name, value in call.items():
        if value is None and name in optional:
            continue
        or_none = " or None" if name in optional else ""
        if name in INTEGERS and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{name}: expected an integer{or_none}, got {value!r}")
        if name in NUMBERS and (not isinstance(value, (Real, Tensor)) or isinstance(value, bool)):
            raise TypeError(f"{name}: expected a number{or_none}, got {value!r}")
        if name == "latents" and not isinstance(value, Tensor):
            raise TypeError(f"latents: expected a tensor or None, got {type(value).__name__}")
        if name == "generator":
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(one, Generator):
                    raise TypeError(f"generator: expected a torch.Generator or a list of them, got {one!r}")


def check(
    call: dict[str, Any], edit_mask: Any, config: SpecEditConfig, named: str = "edit_mask"
) -> list[Tensor] | None:
    """Check a call's arguments, and read its mask (`masks.read`), which the caller has given as `named`.

    Numbers, arrays and tensors have to be finite, whatever the argument and however deep in lists and dicts: NaN in
    guidance, latents or embeddings would come out as a black picture.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, value in call.items():
        _check_finite(name, value)
    if edit_mask is None:
        return None
    method = config.method_options
    if method is not None and not _takes_mask(config):
        raise ValueError(
            f"edit_mask: expected none with method={method.name!r}, which edits the whole picture, unless keep_pixels "
            f"gives back what lies outside it; got {type(edit_mask).__name__}"
        )
    try:
        return _read_mask(edit_mask, call)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("edit_mask:", f"{named}:", 1)) from error


def _read_mask(mask: Any, call: dict[str, Any]) -> list[Tensor]:
    """`masks.read` for a call's batch."""
    known = isinstance(call.get("prompt"), (str, list)) or isinstance(call.get("prompt_embeds"), Tensor)
    prompts = count_prompts(call) if known else 1  # the pipeline's own check names what is wrong with them
    image = call.get("image")
    pictures = len(image) if isinstance(image, (list, tuple)) else 1
    batch = prompts * (call.get("num_images_per_prompt") or 1)
    found = masks.read(mask, batch)
    if not found or batch % len(found):
        raise masks.wrong_count(found, batch, prompts, pictures)
    return found


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, one in value.items():
            _check_finite(f"{name}[{key!r}]", one)
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            _check_finite(f"{name}[{i}]", one)
    elif isinstance(value, Real) and not isinstance(value, Integral):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    elif isinstance(value, (np.ndarray, Tensor)) and not _is_finite(value):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _is_finite(values: np.ndarray | Tensor) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind not in "fc" or bool(np.isfinite(values).all())
    if values.is_meta or not (values.is_floating_point() or values.is_complex()):
        return True
    return bool((values if values.dtype.itemsize > 1 else values.float()).isfinite().all())

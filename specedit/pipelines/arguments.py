"""Arguments of a pipeline's call that depend on the pipeline: guidance and size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from . import Prepare, fit

Shown = Callable[[str], str]  # how an argument is called in messages


def guidance(pipe: Any, asked: Mapping[str, Any], shown: Shown = str) -> dict[str, Any]:
    """`negative_prompt` and `true_cfg_scale` of `asked`, for the call of `pipe`; None is not given.

    Raises:
        ValueError: a scale for a pipeline without one, or a negative prompt that would have no effect.
    """
    given = {name: value for name in ("negative_prompt", "true_cfg_scale") if (value := asked.get(name)) is not None}
    taken = inspect.signature(type(pipe).__call__).parameters
    name, scaled = type(pipe).__name__, shown("true_cfg_scale")
    if "true_cfg_scale" not in taken:
        if "true_cfg_scale" in given:
            raise ValueError(f"{scaled}: expected none with {name}, got {given['true_cfg_scale']:g}")
        return given
    scale = given.get("true_cfg_scale", taken["true_cfg_scale"].default)
    if "negative_prompt" in given and scale <= 1:
        whose = "" if "true_cfg_scale" in given else f", the default of {name}"
        raise ValueError(f"{shown('negative_prompt')}: expected {scaled} above 1 with it, got {scale:g}{whose}")
    return given


def sized(image: Any, pipe: Any, prepare: Prepare, size: int | None, shown: Shown = str) -> tuple[Any, dict[str, Any]]:
    """The picture for the pipeline, at most `size` px on its longer side, and the arguments to pass with it.

    Raises:
        ValueError: a size for a pipeline that chooses its own.
    """
    if size is None:
        return prepare(image)
    own = "_auto_resize" in inspect.signature(type(pipe).__call__).parameters  # FLUX.1-Kontext
    if not own and not hasattr(pipe, "picture_size"):
        raise ValueError(
            f"{shown('size')}: expected none with {type(pipe).__name__}, which chooses its own, got {size}"
        )
    image, given = prepare(fit(image, size))
    if own:
        given |= dict(height=image.height, width=image.width, max_area=image.height * image.width, _auto_resize=False)
    return image, given

"""Pipelines by name, and pictures at the size that they take, for the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from . import loading

EDITORS = ("kontext", "qwen")  # that specedit.micro can load
LARGEST = 1024 * 1024  # px that the released editors are made for


def load(
    model: str | None, own_size: bool = True, offload: bool = False
) -> tuple[Any, Callable[[Any], tuple[Any, dict[str, Any]]]]:
    """The pipeline, and what makes of a picture the one that it takes and the arguments to pass beside it.

    Args:
        model: hub id or directory of a pipeline, or an embedded editor, by default the first.
        own_size: an edit gets its picture's size where the pipeline takes one and the picture has no more than a
            megapixel; otherwise the pipeline chooses.
        offload: only the part that runs is on the GPU (diffusers' model offloading), for models that it does not hold.

    Raises:
        ValueError: neither an editor, a directory with a whole pipeline, nor a pipeline that the hub gives.
        FileNotFoundError: an embedded editor without weights.
    """
    if model is not None and model not in EDITORS:
        loading.check_model(model, EDITORS)
    import torch

    from . import micro

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def placed(pipe: Any) -> Any:
        if not offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe

    def small(image: Any, editor: str = EDITORS[0]) -> tuple[Any, dict[str, Any]]:
        image = fit(image, 512)
        return image, micro.arguments(image, editor)

    if model is None or model in EDITORS:
        editor = model or EDITORS[0]
        return placed(micro.load(editor, device="cpu" if offload else device)), lambda image: small(image, editor)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = placed(loading.from_pretrained(model, dtype))
    taken = inspect.signature(type(pipe).__call__).parameters
    # A small editor, which works at the picture's own size; FLUX.1-Kontext has 19 such layers.
    if "max_area" in taken and pipe.transformer.config.num_layers < 19:
        return pipe, small
    names = [name for name in ("height", "width") if name in taken]

    def sized(image: Any) -> tuple[Any, dict[str, Any]]:
        # Of FLUX.1-Kontext this sets the aspect ratio alone. Others would edit a photograph at all of its megapixels.
        if "max_area" in taken or (own_size and image.width * image.height <= LARGEST):
            return image, {name: getattr(image, name) for name in names}
        return image, {}

    return pipe, sized


def fit(image: Any, largest: int) -> Any:
    """Resize to at most `largest` px a side and whole tokens of 16 px, at least one."""
    scale = min(1.0, largest / max(image.size))
    size = tuple(max(round(side * scale) // 16, 1) * 16 for side in image.size)
    return image if size == image.size else image.resize(size)

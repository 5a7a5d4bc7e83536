"""Pipelines by name, with pictures at the right size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import loading

EDITORS = ("kontext", "qwen")  # that specedit.micro can load
LARGEST_EMBEDDED = 512  # px a side that the embedded editors are given
MEGAPIXEL = 1024 * 1024
Prepare = Callable[[Any], tuple[Any, dict[str, Any]]]  # from a picture to the picture to pass and further arguments


def load(model: str | None, offload: bool = False) -> tuple[Any, Prepare]:
    """The pipeline, and a function from a picture to the picture to pass and further arguments, such as its size.

    Args:
        model: hub id or directory of a pipeline, or an embedded editor, by default the first.
        offload: keep only the running part on the GPU (diffusers' model offloading), for models that do not fit.

    Raises:
        ValueError: neither an editor, a directory with a complete pipeline, nor a pipeline on the hub.
        FileNotFoundError: an embedded editor without weights.
    """
    if model is not None and model not in EDITORS:
        loading.check_model(model, EDITORS)
    import torch

    from .. import micro
    from ..api.sizes import size_for
    from ..models import adapter_of

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def placed(pipe: Any) -> Any:
        if not offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe

    def small(image: Any, editor: str = EDITORS[0]) -> tuple[Any, dict[str, Any]]:
        image = fit(image, LARGEST_EMBEDDED)
        return image, micro.arguments(image, editor) | size_for(pipe, image)

    if model is None or model in EDITORS:
        editor = model or EDITORS[0]
        pipe = placed(micro.load(editor, device="cpu" if offload else device))
        return pipe, lambda image: small(image, editor)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if (trained := loading.embedded_editor(model)) is not None:
        read = micro.editors.editor_named(trained).load
        pipe = placed(loading.from_pretrained(model, torch.float32, read))
        return pipe, lambda image: small(image, trained)
    pipe = placed(loading.from_pretrained(model, dtype))

    def sized(image: Any) -> tuple[Any, dict[str, Any]]:
        return image, {} if adapter_of(pipe) is None else size_for(pipe, image)

    return pipe, sized


def fit(image: Any, largest: int) -> Any:
    """Resize to at most `largest` px a side, in multiples of 16 px, at least 16."""
    size = fitted(image.width, image.height, largest)
    return image if size == image.size else image.resize(size)


def fitted(width: int, height: int, largest: int) -> tuple[int, int]:
    """The width and height that `fit` gives a picture."""
    scale = min(1.0, largest / max(width, height))
    return _whole(width * scale), _whole(height * scale)


def planned_size(width: int, height: int, *, embedded: bool, largest: int | None = None) -> tuple[int, int]:
    """About the width and height at which a pipeline edits a picture, known before the pipeline is loaded.

    Released models edit at a megapixel in the picture's shape, and the embedded editors at up to 512 px a side.
    largest: px of the longer side at most, where it is chosen.
    """
    if largest:
        width, height = fitted(width, height, largest)
    if embedded:
        return fitted(width, height, LARGEST_EMBEDDED)
    if largest:
        return width, height
    scale = (MEGAPIXEL / (width * height)) ** 0.5
    return _whole(width * scale), _whole(height * scale)


def _whole(side: float) -> int:
    return max(round(side) // 16, 1) * 16

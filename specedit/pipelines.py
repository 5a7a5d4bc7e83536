"""Pipelines by name, and pictures at the size that they take, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

EDITORS = ("kontext", "qwen")  # that specedit.micro can load


def read(path: Path) -> Any:
    """The picture in a file, as its viewer shows it."""
    from PIL import Image

    from .tasks import upright

    try:
        return upright(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error


def load(model: str | None, offload: bool = False) -> tuple[Any, Callable[[Any], tuple[Any, dict[str, Any]]]]:
    """The pipeline, and a function from a picture to the picture to pass and the arguments beside it, such as its size.

    Args:
        model: hub id or directory of a pipeline, or an embedded editor, by default the first.
        offload: only the part that runs is on the GPU (diffusers' model offloading), for models that it does not hold.

    Raises:
        ValueError: a directory without a pipeline.
        FileNotFoundError: an embedded editor without weights.
    """
    import torch

    from . import micro
    from .models import adapter_of
    from .models.shapes import is_embedded_kontext
    from .sizes import size_for

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def placed(pipe: Any) -> Any:
        if not offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe

    def small(image: Any, editor: str = EDITORS[0]) -> tuple[Any, dict[str, Any]]:
        image = fit(image, 512)
        return image, micro.arguments(image, editor) | size_for(pipe, image)

    if model is None or model in EDITORS:
        editor = model or EDITORS[0]
        pipe = placed(micro.load(editor, device="cpu" if offload else device))
        return pipe, lambda image: small(image, editor)
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"--model: expected a pipeline directory with a model_index.json, got {model}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = placed(DiffusionPipeline.from_pretrained(model, torch_dtype=dtype))
    if is_embedded_kontext(pipe):
        return pipe, small

    def sized(image: Any) -> tuple[Any, dict[str, Any]]:
        return image, {} if adapter_of(pipe) is None else size_for(pipe, image)

    return pipe, sized


def fit(image: Any, largest: int) -> Any:
    """Resize to at most `largest` px a side and whole tokens of 16 px.

    Raises:
        ValueError: a side is, or would become, shorter than four tokens.
    """
    from .models.images import SMALLEST

    if min(image.size) < SMALLEST:
        raise ValueError(f"image: expected at least {SMALLEST} px a side, got {image.width} x {image.height}")
    scale = min(1.0, largest / max(image.size))
    width, height = (round(side * scale) // 16 * 16 for side in image.size)
    if min(width, height) < SMALLEST:
        raise ValueError(f"image: expected sides less unequal, got {image.width} x {image.height}")
    return image if (width, height) == image.size else image.resize((width, height))

"""The embedded Qwen editor at run time: its weights and its pipeline's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from .pipelines import OwnSizeQwenImageEditPipeline, PictureProcessor

EMPTY_PROMPT = " "
TRUE_CFG_SCALE = 2.0  # each task has one right answer, which higher scales overshoot


def read(folder: Path, **kwargs: Any) -> OwnSizeQwenImageEditPipeline:
    """Read a Qwen editor from a directory; `kwargs` go to `from_pretrained`."""
    processor = PictureProcessor.from_pretrained(Path(folder) / "processor", local_files_only=True)
    return OwnSizeQwenImageEditPipeline.from_pretrained(folder, local_files_only=True, processor=processor, **kwargs)


def arguments(image: Image.Image) -> dict[str, Any]:
    """Arguments for the image's own size, and true guidance against an empty prompt."""
    width, height = (side // 16 * 16 for side in image.size)
    return dict(height=height, width=width, negative_prompt=EMPTY_PROMPT, true_cfg_scale=TRUE_CFG_SCALE)


def passes(pipe: Any, case: Any, call: dict[str, Any]) -> list[int]:
    """One transformer call per prompt and step, on target, reference and that prompt's tokens."""
    prompts = [case.prompt]
    if call.get("negative_prompt") is not None and call.get("true_cfg_scale", 4.0) > 1:
        prompts.append(call["negative_prompt"])
    images = 2 * (case.source.width // 16) * (case.source.height // 16)
    texts = [pipe.prompt_template_encode.format(prompt) for prompt in prompts]
    ids = pipe.processor(text=texts, images=[case.source] * len(prompts), padding=True, return_tensors="pt")
    return [images + int(row.sum()) - pipe.prompt_template_encode_start_idx for row in ids["attention_mask"]]

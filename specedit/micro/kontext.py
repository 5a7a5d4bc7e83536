"""The embedded FLUX-Kontext editor at run time: its weights and its pipeline's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .words import warn_unless_understood

TEXT_TOKENS = 32  # length of the T5 sequence in training


class CappedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that never pads beyond `model_max_length`, and warns of prompts that the editor was not trained on.

    FluxKontextPipeline pads prompts to `max_sequence_length=512` by default. Training had no padding, and 480 padding
    tokens would outnumber the image tokens.
    """

    def __call__(self, text=None, *args, max_length: int | None = None, **kwargs):
        warn_unless_understood(text or (), vars(self).setdefault("warned_prompts", set()))
        if max_length is not None:
            max_length = min(max_length, self.model_max_length)
        return super().__call__(text, *args, max_length=max_length, **kwargs)


def read(folder: Path, **kwargs: Any) -> FluxKontextPipeline:
    """Read a Kontext editor from a directory; `kwargs` go to `from_pretrained`."""
    tokenizers = {
        name: CappedTokenizer.from_pretrained(folder / name, local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    }
    warned: set[str] = set()  # shared: both tokenizers see every prompt
    for tokenizer in tokenizers.values():
        tokenizer.warned_prompts = warned
    parts = tokenizers | nested_clip(folder / "text_encoder", kwargs.get("torch_dtype"))
    pipe = FluxKontextPipeline.from_pretrained(folder, local_files_only=True, **parts, **kwargs)
    pipe.vae.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
    return pipe


def nested_clip(folder: Path, dtype: torch.dtype | None) -> dict[str, CLIPTextModel]:
    """`text_encoder` with renamed weights if this transformers needs it, else nothing.

    Before transformers 5, CLIPTextModel nests its parts in `text_model`. The file has the names of transformers 5.
    """
    with torch.device("meta"):
        names = CLIPTextModel(CLIPTextConfig.from_pretrained(folder)).state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        flat = not any(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    if not (flat and any(name.startswith("text_model.") for name in names)):
        return {}
    mapping = {r"^(?!text_model\.)": "text_model."}
    return {
        "text_encoder": CLIPTextModel.from_pretrained(
            folder, local_files_only=True, key_mapping=mapping, torch_dtype=dtype or torch.float32
        )
    }


def arguments(image: Image.Image) -> dict[str, Any]:
    """Arguments that keep the image's size; the default is about one megapixel and 512 text tokens."""
    width, height = (side // 16 * 16 for side in image.size)
    return dict(
        height=height, width=width, max_area=height * width, _auto_resize=False, max_sequence_length=TEXT_TOKENS
    )


def passes(pipe: Any, case: Any, call: dict[str, Any]) -> list[int]:
    """One transformer call per step, on target, reference and text tokens: guidance is distilled."""
    return [2 * (case.source.width // 16) * (case.source.height // 16) + TEXT_TOKENS]

"""Prompts with pictures, as Qwen-Image's transformer takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..shared.conditioning import Prompt, PromptConditioning
from ..shared.prompts import with_negative


@dataclass(eq=False)
class QwenPrompt(Prompt):
    """mask: (B, L) bool of the words, and how many each sample has; both None where nothing is padding."""

    mask: Tensor | None
    lengths: list[int] | None


@dataclass(kw_only=True)
class QwenConditioning(PromptConditioning[QwenPrompt]):
    """call, condition: the call's arguments and pictures, from which a draft encodes its own. kwargs: for attention."""

    call: dict[str, Any]
    condition: list[Image.Image]
    kwargs: dict[str, Any]


def encode(
    pipe: Any, call: dict[str, Any], condition: list[Image.Image], device: torch.device
) -> tuple[QwenPrompt, QwenPrompt | None]:
    """Both prompts with the pictures, as the stock pipelines encode them.

    The images of a prompt stand together. `encode_prompt` itself repeats embeddings so, but masks one prompt after the
    other, and would give a prompt another one's.
    """
    images = call["num_images_per_prompt"]

    def one(call: dict[str, Any], prefix: str) -> QwenPrompt:
        embeds, mask = pipe.encode_prompt(
            image=condition, prompt=call[f"{prefix}prompt"], prompt_embeds=call[f"{prefix}prompt_embeds"],
            prompt_embeds_mask=call[f"{prefix}prompt_embeds_mask"], device=device,
            num_images_per_prompt=1, max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip
        embeds = embeds.to(device).repeat_interleave(images, 0)  # the caller's own stay where they are
        mask = None if mask is None else mask.to(device).repeat_interleave(images, 0)
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        lengths = None if mask is None else mask.sum(1).tolist()
        return QwenPrompt(embeds, mask, lengths)

    return with_negative(call, one)


def text_counts(positive: QwenPrompt, negative: QwenPrompt | None, attention: str) -> dict[str, float | None]:
    """Mean text tokens of each branch, as EditState's fields. Stock attention computes the padding too."""

    def mean(prompt: QwenPrompt) -> float:
        padded = prompt.lengths is None or attention == "stock"
        return prompt.embeds.shape[1] if padded else sum(prompt.lengths) / len(prompt.lengths)

    return dict(text_tokens=mean(positive), negative_text_tokens=None if negative is None else mean(negative))

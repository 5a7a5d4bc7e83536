"""Prompts with pictures, as the transformer takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..shared.conditioning import Prompt, PromptConditioning
from ..shared.prompts import with_negative
from .prefix import Prefix


@dataclass(eq=False)
class Qwen21Prompt(Prompt):
    """mask: (B, L) bool of what is no padding, or None. slots: (n, L) bool, which embeddings stand for 2 x 2 tokens of
    a picture, at the same places in every sample. words: how many do not."""

    mask: Tensor | None
    slots: Tensor
    words: int


@dataclass(kw_only=True)
class Qwen21Conditioning(PromptConditioning[Qwen21Prompt]):
    """kwargs: for attention. prefixes: what is kept of text and references, by branch."""

    kwargs: dict[str, Any]
    prefixes: dict[int, Prefix] = field(default_factory=dict)


def encode(
    pipe: Any, call: dict[str, Any], pictures: list[Image.Image], device: torch.device
) -> tuple[Qwen21Prompt, Qwen21Prompt | None]:
    """Both prompts with the pictures, as the stock pipeline encodes them; the second is None without guidance.

    Raises:
        ValueError: embeddings, which the pipeline takes without pictures only, or too many negative prompts.
    """
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if call[name] is not None:
            kind = name.removesuffix("_embeds")
            raise ValueError(
                f"{name}: expected a {kind} as text beside an image, since nothing says which embeddings are the "
                f"image's, got {type(call[name]).__name__}"
            )

    def one(call: dict[str, Any], prefix: str) -> Qwen21Prompt:
        embeds, mask, slots = pipe.encode_prompt(
            image=pictures, prompt=call[f"{prefix}prompt"], device=device,
            num_images_per_prompt=call["num_images_per_prompt"],
        )  # fmt: skip
        return Qwen21Prompt(embeds, None if mask is None else mask.bool(), slots, int((~slots[0]).sum()))

    return with_negative(call, one)

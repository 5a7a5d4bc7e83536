"""FLUX.2-klein: the base models have classifier-free guidance, the distilled ones none."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline

from ...released import Released
from ..registry import register_adapter
from ..shared.flux_blocks import FluxPrompt
from .edit import Flux2Unpacked, encoded


@register_adapter
class Flux2Klein(Flux2Unpacked):
    """Adapter of Flux2KleinPipeline."""

    name = "flux2-klein"
    pipelines = "Flux2KleinPipeline"
    released = (
        Released("flux2-klein-9b", "FLUX.2-klein, 9B", ("flux.2-klein",)),
        Released("flux2-klein-4b", "FLUX.2-klein, 4B", ("flux.2-klein", "4b")),
    )

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, Flux2KleinPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        given = call["negative_prompt_embeds"]
        if given is not None and is_guided(pipe, call):
            embeds = call["prompt_embeds"]
            length = call["max_sequence_length"] if embeds is None else embeds.shape[1]
            if given.shape[1] != length:
                return f"the negative prompt's embeddings have {given.shape[1]} tokens, and the prompt has {length}"
        return super().refusal(pipe, call, attention)

    def prompts(self, pipe: Any, call: dict[str, Any], device: torch.device) -> tuple[FluxPrompt, FluxPrompt | None]:
        positive, _ = super().prompts(pipe, call, device)
        if not is_guided(pipe, call):
            return positive, None
        empty = [""] * len(call["prompt"]) if isinstance(call["prompt"], list) else ""
        negative = encoded(pipe, call, device, empty, call["negative_prompt_embeds"])
        if len(negative.embeds) == 1:  # one empty prompt serves all given embeddings
            negative.embeds = negative.embeds.expand(len(positive.embeds), -1, -1)
        if (got := negative.embeds.shape) != positive.embeds.shape:
            expected = tuple(positive.embeds.shape)
            raise ValueError(f"negative_prompt_embeds: expected shape {expected}, as the prompt's, got {tuple(got)}")
        return positive, negative


def is_guided(pipe: Any, call: dict[str, Any]) -> bool:
    """Whether a call has classifier-free guidance, whatever another thread's call has set on the pipeline."""
    return call["guidance_scale"] > 1 and not pipe.config.is_distilled

"""FLUX.2-dev: the guidance scale is an input of the transformer, and the prompt may be rewritten first."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from ...released import Released
from ..registry import register_adapter
from ..shared.flux_blocks import FluxPrompt
from .edit import Flux2Blocks, encoded


@register_adapter
class Flux2Dev(Flux2Blocks):
    """Adapter of Flux2Pipeline."""

    name = "flux2-dev"
    pipelines = "Flux2Pipeline"
    released = (Released("flux2-dev", "FLUX.2-dev", ("flux.2-dev",)),)

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, Flux2Pipeline)

    def prompts(self, pipe: Any, call: dict[str, Any], device: torch.device) -> tuple[FluxPrompt, FluxPrompt | None]:
        prompt, temperature = call["prompt"], call["caption_upsample_temperature"]
        if temperature:
            prompt = pipe.upsample_prompt(prompt, images=call["image"], temperature=temperature, device=device)
        return encoded(pipe, call, device, prompt, call["prompt_embeds"]), None

    @staticmethod
    def guidance(call: dict[str, Any], batch: int, device: torch.device) -> Tensor | None:
        return torch.full([1], call["guidance_scale"], device=device, dtype=torch.float32).expand(batch)

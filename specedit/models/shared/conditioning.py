"""Prompts as a transformer takes them, and the part of a call's conditioning that every family has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...method.adapter import Conditioning


@dataclass(eq=False)
class Prompt:
    """One guidance branch: embeddings (B, L, D), which a callback may replace."""

    embeds: Tensor


P = TypeVar("P", bound=Prompt)


@dataclass(kw_only=True)
class PromptConditioning(Conditioning, Generic[P]):
    """Prompt and negative prompt, the latter None without guidance.

    scale: of classifier-free guidance. dtype, source: see `Conditioning`. weights: (B, N, C), 1 where the mask of an
    inpainting call lets tokens change; None of other calls.
    """

    positive: P
    negative: P | None
    scale: float
    dtype: torch.dtype
    source: Tensor | None
    weights: Tensor | None = None

    @property
    def prompt_embeds(self) -> Tensor:
        return self.positive.embeds

    @prompt_embeds.setter
    def prompt_embeds(self, embeds: Tensor) -> None:
        self.positive.embeds = embeds

    def prompts(self, branches: int) -> list[P]:
        """The prompts of so many guidance branches."""
        return [prompt for prompt in (self.positive, self.negative)[:branches] if prompt is not None]

"""One Euler step of samples that share a layout: computed, wholly or in part, or forecast, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SpecEditConfig
from ..cost.flops import transformer_flops
from ..forecast import ForecastRunner, PartialForward, ReferenceKVCache
from ..layout import LayoutSet, MixedLayout
from .adapter import Adapter, EditState, active_branches


@dataclass
class LayoutGroup:
    """Samples of the batch that share a layout, and their state (b, layout.tokens, C)."""

    rows: list[int]
    layout: MixedLayout
    reference: Tensor
    reference_layout: MixedLayout | LayoutSet
    tokens: Tensor
    sigmas: list[float]
    # Caches are made with the part, so no stage inherits another's.
    histories: ForecastRunner | None = None
    kept: ReferenceKVCache | None = None
    flops: float = 0.0
    cached: int = 0  # steps that were not computed fully
    reused: int = 0  # steps that ran over the target's tokens alone
    clean: Tensor | None = None  # what the last step predicted, x0 = x - s v, where somebody looks

    @property
    def cache_bytes(self) -> int:
        return sum(cache.memory for cache in (self.histories, self.kept) if cache is not None)


def reference_kv_cache(adapter: Adapter, config: SpecEditConfig) -> ReferenceKVCache | None:
    """What a part will keep of text and reference, or None where the configuration keeps nothing."""
    if config.reference_refresh is None:
        return None
    if not adapter.keeps_reference:
        raise ValueError(
            f"reference_refresh: expected None for {adapter.name}, which cannot compute the target's tokens alone, "
            f"got {config.reference_refresh}"
        )
    return ReferenceKVCache(config.reference_refresh)


def group_velocity(
    adapter: Adapter, pipe: Any, state: EditState, part: LayoutGroup, i: int, config: SpecEditConfig
) -> Tensor:
    """Velocity of one step of one part, and its work added to the part's account."""
    sigma = part.sigmas[i]
    set_current_timestep(pipe, state, sigma)
    call = (
        pipe, state, part.tokens, sigma, part.rows, part.layout, part.reference, part.reference_layout, config,
    )  # fmt: skip
    branches = active_branches(state, config, sigma)

    def compute(calls: list[PartialForward] | None) -> list[Tensor]:
        if part.kept is not None:
            part.kept.reset_if_prompt_changed(state.extra.get("positive"))
            calls = part.kept.calls(i, branches)
            part.reused += calls[0].target
        part.flops += len(part.rows) * call_flops(pipe, state, part, branches, calls[0] if calls else None)
        return adapter.branches(*call, calls)

    if part.histories is None and part.kept is None:
        part.flops += len(part.rows) * call_flops(pipe, state, part, branches)
        return adapter.velocity(*call)
    if part.histories is None:
        return adapter.guide(state, compute(None))
    part.histories.reset_if_prompt_changed(state.extra.get("positive"))
    outputs = part.histories.step(i, sigma, compute)
    part.cached += not part.histories.last_step.full
    part.flops += part.histories.last_step.flops
    return adapter.guide(state, outputs)


def set_current_timestep(pipe: Any, state: EditState, sigma: float) -> Tensor:
    """Show a step's timestep, () float32, as `pipe.current_timestep`, which hooks on the transformer may read."""
    # Filled on the device: a copy from the host would wait for the step before to end.
    timestep = torch.full((), sigma * 1000, device=state.device)
    pipe._current_timestep = timestep  # which another thread's call may replace at once
    return timestep


def call_flops(
    pipe: Any, state: EditState, part: LayoutGroup, branches: int, call: PartialForward | None = None
) -> float:
    """Operations of one step of one sample: over all its tokens, or over those that `call` asks for."""
    target, beside = part.layout.tokens, part.reference_layout.tokens
    if call is None or not call.partial:
        return forward_flops(pipe, state, target + beside, branches, read=target if state.last_block else None)
    image = target if call.target else call.index.shape[1]
    return forward_flops(
        pipe, state, image, branches, kept=target + beside - image, text=not call.target,
        read=image if state.last_block else None,
    )  # fmt: skip


def forward_flops(
    pipe: Any, state: EditState, image: float, branches: int, *, kept: float = 0, text: bool = True,
    read: float | None = None,
) -> float:  # fmt: skip
    """Operations of one step of one sample over `image` tokens and, where `text` says so, its prompts'.

    branches: guidance passes; a negative prompt may have another length. kept: tokens beside the text that are only
    attended to. read: tokens whose output is read, where the last block computes no others.
    """
    flops = 0.0
    negative = state.text_tokens if state.negative_text_tokens is None else state.negative_text_tokens
    for words in (state.text_tokens, negative)[:branches]:
        tokens = image + words if text else image
        flops += transformer_flops(pipe.transformer.config, tokens, image + kept + words, read)
    return flops

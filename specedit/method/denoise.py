"""One Euler step of samples that share a layout: computed, wholly or in part, or forecast, and what that costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import SpecEditConfig
from ..cost.flops import transformer_flops
from ..forecast import PartialForward, ReferenceKVCache
from .adapter import Adapter, EditState, LayoutGroup, Run, active_branches


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


def group_velocity(run: Run, group: LayoutGroup, i: int) -> Tensor:
    """Velocity of step i of one group, and its work added to the group."""
    adapter, state, sigma = run.adapter, run.state, group.sigmas[i]
    set_current_timestep(run.pipe, state, sigma)
    branches = active_branches(state, run.config, sigma)
    samples = len(group.rows)

    def compute(calls: list[PartialForward] | None) -> list[Tensor]:
        if group.kv is not None:
            group.kv.reset_if_prompt_changed(state.conditioning.prompt_embeds)
            calls = group.kv.calls(i, branches)
            group.reused += calls[0].target
        group.flops += samples * call_flops(run.pipe, state, group, branches, calls[0] if calls else None)
        return adapter.predict(run, group, sigma, calls)

    if group.forecast is None:
        return adapter.guide(run, compute(None))
    group.forecast.reset_if_prompt_changed(state.conditioning.prompt_embeds)
    outputs = group.forecast.step(i, sigma, compute)
    group.cached += not group.forecast.last_step.full
    group.flops += group.forecast.last_step.flops
    return adapter.guide(run, outputs)


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

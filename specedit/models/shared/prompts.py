"""Prompts and negative prompts as every adapter takes them."""

from __future__ import annotations

from typing import Any

from diffusers.utils import logging

from ...once import warn_once

logger = logging.get_logger(__name__)


def count_prompts(call: dict[str, Any], prefix: str = "") -> int:
    """How many prompts a call has, or with "negative_" how many negative ones; at least one of either form is given."""
    prompt = call[f"{prefix}prompt"]
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    return call[f"{prefix}prompt_embeds"].shape[0]


def broadcast_negative_prompt(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its one negative prompt repeated for every prompt, as the stock pipelines broadcast it."""
    prompts = count_prompts(call)
    if prompts == 1 or count_prompts(call, "negative_") != 1:
        return call
    changed: dict[str, Any] = {}
    for name, value in call.items():
        if name.startswith("negative_") and value is not None:
            if isinstance(value, str | list):
                changed[name] = [value] * prompts if isinstance(value, str) else value * prompts
            else:  # embeddings and their masks
                changed[name] = value.repeat(prompts, *[1] * (value.ndim - 1))
    return call | changed


def has_negative(call: dict[str, Any]) -> bool:
    return call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None


def warn_if_guidance_inactive(pipe: Any, call: dict[str, Any]) -> None:
    """The stock pipelines' warnings, once each, for a call that looks as if it wanted guidance."""
    scale = call["true_cfg_scale"]
    if scale > 1 and not has_negative(call):
        text = f"true_cfg_scale is {scale}, but without a negative_prompt there is no guidance"
        warn_once(pipe, text, "guidance without a negative_prompt", logger.warning)
    elif scale <= 1 and has_negative(call):
        text = f"there is a negative_prompt, but true_cfg_scale is {scale}: there is no guidance"
        warn_once(pipe, text, "a negative_prompt without guidance", logger.warning)

"""Prompts and negative prompts as every adapter takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from ...once import warn_once

logger = logging.getLogger("specedit")
P = TypeVar("P")


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


def with_negative(call: dict[str, Any], one: Callable[[dict[str, Any], str], P]) -> tuple[P, P | None]:
    """The prompt and, under true classifier-free guidance, the negative one.

    one: encodes either, from a call's arguments and their prefix, "" or "negative_".

    Raises:
        ValueError: negative prompts that are neither one nor as many as the prompts.
    """
    if not (call["true_cfg_scale"] > 1 and has_negative(call)):
        return one(call, ""), None
    call = broadcast_negative_prompt(call)
    expected, got = count_prompts(call), count_prompts(call, "negative_")
    if expected != got:
        raise ValueError(f"negative_prompt: expected {expected}, one for each prompt, got {got}")
    return one(call, ""), one(call, "negative_")


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

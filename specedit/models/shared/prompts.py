"""Prompts and negative prompts as every adapter takes them."""

from __future__ import annotations

from typing import Any


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

"""The caller's `callback_on_step_end`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import LayoutGroup, Run
from .groups import gather


class StepCallback:
    """Shows the caller full-grid latents and the prompt's embeddings, and takes over what comes back changed.

    function: `callback_on_step_end(pipe, index, timestep, tensors)`. names: the tensors it asks for.
    """

    def __init__(self, function: Callable[..., Any], names: Sequence[str]):
        self.function, self.names = function, names

    def __call__(self, run: Run, groups: Sequence[LayoutGroup], i: int, index: int) -> None:
        state, timestep = run.state, run.set_current_timestep(groups[0].sigmas[i])
        conditioning = state.conditioning
        shown = {
            name: gather(groups, state).to(conditioning.dtype) if name == "latents" else conditioning.prompt_embeds
            for name in self.names
        }
        before = shown.get("latents")
        # A change in place counts as a change too. Whether there is one stays on the device, or every step would wait.
        snapshot = None if before is None else before.clone()
        answer = self.function(run.pipe, index, timestep, dict(shown)) or {}
        if not isinstance(answer, Mapping):
            raise TypeError(f"callback_on_step_end: expected a dict or None, got {type(answer).__name__}")
        if (embeds := answer.get("prompt_embeds")) is not None:
            expected = conditioning.prompt_embeds
            assert expected is not None  # a family's callbacks may only ask for what it has
            _check("prompt_embeds", embeds, expected.shape)
            conditioning.prompt_embeds = embeds
        if (after := answer.get("latents", before)) is None:
            return
        _check("latents", after, state.noise.shape)
        changed = None if snapshot is None else (after.to(snapshot.device) != snapshot).any()
        for group in groups:
            new = group.layout.from_full_grid(torch.stack([after[row] for row in group.rows]).to(group.tokens))
            group.tokens = new if changed is None else torch.where(changed, new, group.tokens)


def _check(name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"callback_on_step_end: expected {name} as a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"callback_on_step_end: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")

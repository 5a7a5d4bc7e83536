"""Text and references, which see neither the target nor the timestep: their keys and values are computed once a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor

from ...layout import TokenGrid
from ...method.adapter import EditState, Run
from ...method.denoise import stage_of
from ...method.trace import prefix_call

if TYPE_CHECKING:
    from .prompts import Qwen21Prompt

SLOT = 4  # tokens of a picture for each embedding that stands for them


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values (B, P, H, D) of every block, and of which embeddings, as often written to as then."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    embeds: Tensor
    version: int | None

    def answers(self, embeds: Tensor) -> bool:
        """Whether it is of these embeddings, which a callback may have replaced or written to."""
        return embeds is self.embeds and version_of(embeds) == self.version

    @property
    def memory(self) -> int:
        """In bytes."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)


def version_of(embeds: Tensor) -> int | None:
    """How often a tensor was written to, where that is counted."""
    return None if embeds.is_inference() else embeds._version


def compute(run: Run, prompt: Qwen21Prompt) -> Prefix:
    """The prefix of all samples under one prompt, beside a target of four tokens: the fewest that the model takes."""
    state, conditioning = run.state, run.state.conditioning
    run.trace.calls.append(prefix_call(stage_of(run), prompt.words, state.reference_grid.tokens, state.batch))
    cache = QwenImage21KVCache(len(run.pipe.transformer.transformer_blocks))
    target = state.reference.new_zeros(state.batch, SLOT, state.reference.shape[2])
    run.pipe.transformer(
        hidden_states=torch.cat([state.reference, target], 1).to(conditioning.dtype),
        timestep=torch.zeros(state.batch, device=state.device, dtype=conditioning.dtype),
        encoder_hidden_states=prompt.embeds,
        encoder_hidden_states_mask=prompt.mask,
        img_shapes=[_shapes(state)] * state.batch,
        img_mask=_slots(prompt),
        attention_kwargs=dict(conditioning.kwargs),
        kv_cache=cache,
        kv_cache_mode="extract",
        return_dict=False,
    )
    layers = tuple((layer.k, layer.v) for layer in cache.layer_caches)
    return Prefix(layers, prompt.embeds, version_of(prompt.embeds))


def prefix_of(run: Run, branch: int, prompt: Qwen21Prompt) -> Prefix:
    """The prefix of a guidance branch, kept for the whole run unless the call says otherwise."""
    state: EditState = run.state
    kept: dict[int, Prefix] = state.conditioning.prefixes
    if branch in kept and kept[branch].answers(prompt.embeds):
        return kept[branch]
    made = compute(run, prompt)
    if state.keeps_prefix:
        kept[branch] = made
    return made


def frame_of(words: int, grids: tuple[TokenGrid, ...]) -> int:
    """The target's place in the text: each word takes one, and each picture as many as its longer side."""
    return words + sum(max(grid.shape) for grid in grids)


def _shapes(state: EditState) -> list[tuple[int, int, int]]:
    """Of the references, and of the target beside which the prefix is computed."""
    return [*((1, *grid.shape) for grid in state.reference_grid.grids), (1, 2, 2)]


def _slots(prompt: Qwen21Prompt) -> Tensor:
    """(n, L + 1) bool: the prompt's, and that target's."""
    return torch.cat([prompt.slots, prompt.slots.new_ones(len(prompt.slots), 1)], 1)


def references_within(run: Run, prompt: Qwen21Prompt) -> tuple[Tensor, Tensor]:
    """Where the references' tokens stand in the prefix, (R,) int64, and their frequencies (R, D/2) complex64."""
    slots = _slots(prompt)[0]
    is_image = slots.repeat_interleave(torch.where(slots, SLOT, 1))
    at = is_image.nonzero()[:-SLOT, 0]
    return at, run.pipe.transformer.pos_embed(_shapes(run.state), is_image, device=at.device)[at]


def hidden_keys(prompt: Qwen21Prompt) -> Tensor | None:
    """(B, P) float32, -inf at the keys of padding; None where nothing is padding."""
    if prompt.mask is None:
        return None
    repeats = torch.where(prompt.slots[0], SLOT, 1)
    valid = prompt.mask.repeat_interleave(repeats, 1)
    return torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, -torch.inf)

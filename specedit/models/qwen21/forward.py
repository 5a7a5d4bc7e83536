"""One evaluation of the transformer over a target of any layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...method.adapter import LayoutGroup, Run, rows_index
from ..attention import contexts
from ..shared.modulation import at_step
from .attention import BesidePrefix, PrefixCache, PrefixLayer
from .positions import Placed, frequencies, spans
from .prefix import SLOT, Prefix, frame_of, hidden_keys, prefix_of
from .prompts import Qwen21Prompt


@dataclass(frozen=True, eq=False)
class StageInputs:
    """What the transformer is given alike in every step of a stage under one prompt.

    rows: which samples. placed: where the target's tokens lie. context: of attention. padding: tokens that are added in
    front, because the model takes a multiple of four. kept: the prefix, with its layers for these samples; None where
    every step computes it.
    """

    rows: slice | Tensor
    placed: Placed
    context: BesidePrefix
    padding: int
    kept: tuple[Prefix, tuple[PrefixLayer, ...]] | None = None

    @property
    def memory(self) -> int:
        """Bytes of the samples' share of what is kept."""
        if self.kept is None:
            return 0
        return sum(x.numel() * x.element_size() for layer in self.kept[1] for x in layer.get())

    def layers_of(self, prefix: Prefix) -> tuple[PrefixLayer, ...]:
        """The samples' share of a prefix, for every block."""
        return tuple(PrefixLayer(k[self.rows], v[self.rows], self.context) for k, v in prefix.layers)


def predicted(run: Run, group: LayoutGroup, sigma: float, branch: int, prompt: Qwen21Prompt) -> Tensor:
    """The transformer's output (b, N, C) float32 for a group's target under one prompt."""
    stage, layers = stage_inputs(run, group, branch, prompt)
    conditioning, states = run.state.conditioning, F.pad(group.tokens, (0, 0, stage.padding, 0))
    timestep = torch.full((len(states),), sigma * 1000, device=states.device, dtype=torch.float32)
    with at_step(run, group, sigma, len(states)):
        out: Tensor = run.pipe.transformer(
            hidden_states=states.to(conditioning.dtype),
            timestep=timestep.to(conditioning.dtype) / 1000,
            encoder_hidden_states=prompt.embeds[stage.rows][:, :0],
            img_shapes=[stage.placed],
            img_mask=torch.ones(1, states.shape[1] // SLOT, dtype=torch.bool, device=states.device),
            attention_kwargs=dict(conditioning.kwargs),
            kv_cache=PrefixCache(layers),
            kv_cache_mode="cached",
            return_dict=False,
        )[0]
    return out[:, stage.padding :].float()


def stage_inputs(
    run: Run, group: LayoutGroup, branch: int, prompt: Qwen21Prompt
) -> tuple[StageInputs, tuple[PrefixLayer, ...]]:
    """Made by the first step of a stage, and anew where a callback has replaced the prompt; and a step's prefix."""
    prefix, made = prefix_of(run, branch, prompt), group.inputs.get(branch)
    if made is not None and made.kept is not None and made.kept[0] is prefix:
        return made, made.kept[1]
    if made is None or made.kept is not None:
        made = _stage_inputs(run, group, prompt, prefix)
    layers = made.layers_of(prefix)
    group.inputs[branch] = replace(made, kept=(prefix, layers)) if run.state.keeps_prefix else made
    return group.inputs[branch], layers


def _stage_inputs(run: Run, group: LayoutGroup, prompt: Qwen21Prompt, prefix: Prefix) -> StageInputs:
    state, count, device = run.state, group.layout.tokens, group.tokens.device
    padding, rows, kept = -count % SLOT, rows_index(group.rows, state.device), prefix.layers[0][0]
    positions, area = (each.to(device) for each in spans(group.layout, state.grid))
    frame = frame_of(prompt.words, state.reference_grid.grids)
    placed = frequencies(run.pipe.transformer.pos_embed, frame, F.pad(positions, (0, 0, padding, 0)), state.grid)
    is_coarse = group.layout.grid != state.grid or not group.layout.is_fine
    weights = area.log() if is_coarse and run.config.key_bias == "area" else None
    bias = key_bias(hidden_keys(prompt), rows, weights, count, padding, kept)
    return StageInputs(rows, Placed(len(placed), placed), context_of(run, placed, bias, kept.shape[1]), padding)


def key_bias(
    hidden: Tensor | None, rows: slice | Tensor, weights: Tensor | None, count: int, padding: int, kept: Tensor
) -> Tensor | None:
    """(S,) or (b, S) float32 of the prefix's keys and the target's, or None where it would be 0.

    hidden: -inf at the prefix's padding. weights: log of the area of every target token. kept: keys of the prefix.
    """
    if hidden is None and weights is None and not padding:
        return None
    own = torch.zeros(count, device=kept.device) if weights is None else weights
    own = F.pad(own, (padding, 0), value=-torch.inf)
    if hidden is None:
        return torch.cat([own.new_zeros(kept.shape[1]), own])
    hidden = hidden[rows]
    return torch.cat([hidden, own.expand(len(hidden), -1)], 1)


def context_of(run: Run, placed: Tensor, bias: Tensor | None, before: int) -> BesidePrefix:
    """How a target at these frequencies attends to `before` keys of the prefix and its own."""
    tables = placed.real.contiguous(), placed.imag.contiguous()
    index = torch.arange(before + len(placed), device=placed.device)
    every: contexts.Context | None = None
    if run.config.attention == "stock":
        every = None if bias is None else contexts.Masked(rotary=tables, index=index, key_bias=bias)
    elif bias is not None or run.config.attention != "auto":
        every = contexts.Mixed(rotary=tables, index=index, key_bias=bias, backend=run.state.backend)
    return BesidePrefix(rotary=tables, index=index, every=every)

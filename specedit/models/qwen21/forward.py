"""One evaluation of the transformer over a target of any layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...method.adapter import LayoutGroup, Run, rows_index
from ..attention import contexts
from .attention import BesidePrefix, PrefixCache, PrefixLayer
from .positions import Placed, frequencies, spans
from .prefix import SLOT, Prefix, frame_of, hidden_keys, prefix_of
from .prompts import Qwen21Prompt


@dataclass(frozen=True, eq=False)
class StageInputs:
    """What the transformer is given alike in every step of a stage under one prompt.

    rows: which samples. placed: where the target's tokens lie. context: of attention. padding: tokens that are added in
    front, because the model takes a multiple of four. layers: of the `prefix`, or empty where it is computed in every
    step.
    """

    rows: slice | Tensor
    placed: Placed
    context: BesidePrefix
    padding: int
    prefix: Prefix
    layers: tuple[PrefixLayer, ...]

    @property
    def memory(self) -> int:
        """Bytes of the samples' share of the prefix."""
        kept = self.layers[0].k.shape[0] / self.prefix.layers[0][0].shape[0] if self.layers else 0
        return round(kept * self.prefix.memory)


def predicted(run: Run, group: LayoutGroup, sigma: float, branch: int, prompt: Qwen21Prompt) -> Tensor:
    """The transformer's output (b, N, C) float32 for a group's target under one prompt."""
    stage, prefix = stage_inputs(run, group, branch, prompt)
    layers = stage.layers or layers_of(prefix, stage)
    conditioning, states = run.state.conditioning, F.pad(group.tokens, (0, 0, stage.padding, 0))
    timestep = torch.full((len(states),), sigma * 1000, device=states.device, dtype=torch.float32)
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


def stage_inputs(run: Run, group: LayoutGroup, branch: int, prompt: Qwen21Prompt) -> tuple[StageInputs, Prefix]:
    """Made by the first step of a stage, and anew where a callback has replaced the prompt; and the prefix."""
    prefix, made = prefix_of(run, branch, prompt), group.inputs.get(branch)
    if made is None or (run.state.keeps_prefix and made.prefix is not prefix):
        made = group.inputs[branch] = _stage_inputs(run, group, prompt, prefix)
    return made, prefix


def _stage_inputs(run: Run, group: LayoutGroup, prompt: Qwen21Prompt, prefix: Prefix) -> StageInputs:
    state, count, device = run.state, group.layout.tokens, group.tokens.device
    padding, rows = -count % SLOT, rows_index(group.rows, state.device)
    positions, area = (each.to(device) for each in spans(group.layout, state.grid))
    frame = frame_of(prompt.words, state.reference_grid.grids)
    placed = frequencies(run.pipe.transformer.pos_embed, frame, F.pad(positions, (0, 0, padding, 0)), state.grid)
    is_coarse = group.layout.grid != state.grid or not group.layout.is_fine
    weights = area.log() if is_coarse and run.config.key_bias == "area" else None
    bias = key_bias(hidden_keys(prompt), rows, weights, count, padding, prefix.layers[0][0])
    context = context_of(run, placed, bias, prefix.layers[0][0].shape[1])
    stage = StageInputs(rows, Placed(len(placed), placed), context, padding, prefix, ())
    if not state.keeps_prefix:
        return stage
    return StageInputs(rows, stage.placed, context, padding, prefix, layers_of(prefix, stage))


def layers_of(prefix: Prefix, stage: StageInputs) -> tuple[PrefixLayer, ...]:
    """The samples' share of a prefix, for every block."""
    return tuple(PrefixLayer(k[stage.rows], v[stage.rows], stage.context) for k, v in prefix.layers)


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

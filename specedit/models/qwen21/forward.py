"""One evaluation of the transformer over a target of any layout, or over some of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...forecast.kv_cache import PartialForward
from ...method.adapter import LayoutGroup, Run, rows_index
from ..attention import contexts
from ..attention.sequences import Pair
from ..shared.modulation import at_step
from .attention import BesidePrefix, PrefixCache, PrefixLayer
from .positions import Placed, frequencies, spans
from .prefix import SLOT, Prefix, frame_of, hidden_keys, prefix_of, references_within
from .prompts import Qwen21Prompt
from .some_tokens import SomeTokens, fused_rows


@dataclass(frozen=True, eq=False)
class StageInputs:
    """What the transformer is given alike in every step of a stage under one prompt.

    rows: which samples. placed: where the target's tokens lie. context: of attention. padding: tokens that are added in
    front, because the model takes a multiple of four. prefix: beside which it was made; None where every step computes
    another.
    """

    rows: slice | Tensor
    placed: Placed
    context: BesidePrefix
    padding: int
    prefix: Prefix | None


@dataclass(frozen=True, eq=False)
class SamplesPrefix:
    """A group's samples' share of a prefix: keys and values (b, P, H, D) of every block."""

    prefix: Prefix
    layers: tuple[Pair, ...]

    @property
    def memory(self) -> int:
        """In bytes."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)


def predicted(
    run: Run, group: LayoutGroup, sigma: float, branch: int, prompt: Qwen21Prompt, call: PartialForward | None
) -> Tensor:
    """The transformer's output (b, N, C) float32 for a group's target under one prompt.

    call: None, or how keys and values of the target are kept; then maybe of some tokens alone, (b, m, C).
    """
    stage, layers = stage_inputs(run, group, branch, prompt, stores=call is not None)
    placed, context, padding = stage.placed, stage.context, stage.padding
    if call is not None and call.index is not None:
        some = some_tokens(run, group, branch, prompt, stage, call)
        placed, context, padding = some.placed, some.context, some.padding
        states = group.tokens.gather(1, some.tokens[..., None].expand(-1, -1, group.tokens.shape[2]))
    else:
        states = F.pad(group.tokens, (0, 0, padding, 0))
        if call is not None:
            call.store.text_tokens = padding  # rows before the target's
            context = context.storing(call.store.entries)
    conditioning = run.state.conditioning
    timestep = torch.full((len(states),), sigma * 1000, device=states.device, dtype=torch.float32)
    with at_step(run, group, sigma, len(states)):
        out: Tensor = run.pipe.transformer(
            hidden_states=states.to(conditioning.dtype),
            timestep=timestep.to(conditioning.dtype) / 1000,
            encoder_hidden_states=prompt.embeds[stage.rows][:, :0],
            img_shapes=[placed],
            img_mask=torch.ones(1, states.shape[1] // SLOT, dtype=torch.bool, device=states.device),
            attention_kwargs=dict(conditioning.kwargs),
            kv_cache=PrefixCache(tuple(PrefixLayer(k, v, context) for k, v in layers)),
            kv_cache_mode="cached",
            return_dict=False,
        )[0]
    return out[:, padding:].float()


def stage_inputs(
    run: Run, group: LayoutGroup, branch: int, prompt: Qwen21Prompt, stores: bool
) -> tuple[StageInputs, tuple[Pair, ...]]:
    """Made by the first step of a stage, and anew where a callback has replaced the prompt; and a step's prefix.

    stores: a cache needs our own attention, also where stock's would do.
    """
    prefix, key, kept = prefix_of(run, branch, prompt), (branch, stores), group.inputs.get(branch)
    made = group.inputs.get(key)
    if made is None or made.prefix not in (None, prefix):
        made = group.inputs[key] = _stage_inputs(run, group, prompt, prefix, stores)
    if kept is None or kept.prefix is not prefix:
        kept = SamplesPrefix(prefix, tuple((k[made.rows], v[made.rows]) for k, v in prefix.layers))
        if run.state.keeps_prefix:
            group.inputs[branch] = kept
    return made, kept.layers


def some_tokens(
    run: Run, group: LayoutGroup, branch: int, prompt: Qwen21Prompt, stage: StageInputs, call: PartialForward
) -> SomeTokens:
    """What a call over some tokens takes, made once for all steps over the same ones."""
    key, index = ("some", branch), call.index
    some = group.inputs.get(key)
    if some is None or some.of[0] is not stage.context or some.of[1] is not index:
        some = group.inputs[key] = SomeTokens.of_stage(stage.context, stage.placed, stage.padding, index)
    if call.fusion is None:
        return some.with_kept(call.store, None)
    if ("references", branch) not in group.inputs:
        group.inputs["references", branch] = references_within(run, prompt)
    within = group.inputs["references", branch]
    return some.with_kept(call.store, fused_rows(within, stage.placed, stage.padding, call.fusion))


def _stage_inputs(run: Run, group: LayoutGroup, prompt: Qwen21Prompt, prefix: Prefix, stores: bool) -> StageInputs:
    state, count, device = run.state, group.layout.tokens, group.tokens.device
    padding, rows, kept = -count % SLOT, rows_index(group.rows, state.device), prefix.layers[0][0]
    positions, area = (each.to(device) for each in spans(group.layout, state.grid))
    frame = frame_of(prompt.words, state.reference_grid.grids)
    placed = frequencies(run.pipe.transformer.pos_embed, frame, F.pad(positions, (0, 0, padding, 0)), state.grid)
    is_coarse = group.layout.grid != state.grid or not group.layout.is_fine
    weights = area.log() if is_coarse and run.config.key_bias == "area" else None
    bias = key_bias(hidden_keys(prompt), rows, weights, count, padding, kept)
    context = context_of(run, len(group.rows), placed, bias, kept.shape[1], stores)
    return StageInputs(rows, Placed(len(placed), placed), context, padding, prefix if state.keeps_prefix else None)


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


def context_of(run: Run, batch: int, placed: Tensor, bias: Tensor | None, before: int, stores: bool) -> BesidePrefix:
    """How the targets of `batch` samples, at these frequencies, attend to `before` keys of the prefix and their own."""
    tables = placed.real.contiguous(), placed.imag.contiguous()
    index = torch.arange(before + len(placed), device=placed.device)
    every: contexts.Context | None = None
    if run.config.attention == "stock":
        every = None if bias is None else contexts.Masked(rotary=tables, index=index, key_bias=bias)
    elif stores or bias is not None or run.config.attention != "auto":
        mixed = contexts.Mixed(rotary=tables, index=index, key_bias=bias, backend=run.state.backend)
        every = mixed.with_plan(batch, run.state.conditioning.dtype, queries=len(placed))
    return BesidePrefix(rotary=tables, index=index, every=every)

"""Transformers of FLUX's double and single blocks, over any token layout."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...forecast.toca import PartialForward
from ...layout import MixedLayout, TokenGrid
from ...method.adapter import EditState, LayoutGroup, Run, active_branches, rows_index
from ..attention import contexts, kept_keys, processors, sequences
from ..attention.fused_rows import FusedRows
from ..attention.measuring import Measuring
from . import decode_boxes
from .block_adapter import BlockAdapter, pixels_per_token
from .conditioning import Prompt
from .images import decoder_dtype, decoder_features
from .modulation import at_step

# Linear layers of FLUX.1's blocks that make nothing but modulation.
MODULATED = {
    "transformer_blocks": ("norm1.linear", "norm1_context.linear"), "single_transformer_blocks": ("norm.linear",)
}  # fmt: skip


@dataclass(eq=False)
class FluxPrompt(Prompt):
    """text_ids: (L, axes), the text's position ids."""

    text_ids: Tensor


@dataclass(frozen=True, eq=False)
class StageInputs:
    """What the transformer is given alike in every step of a stage.

    ids: (N, axes) float32 positions of target and reference. tables: cos and sin (S, D) of the text's ids and of these.
    rows: which samples. context: of attention, None in a stock call.
    """

    ids: Tensor
    tables: contexts.Tables
    rows: slice | Tensor
    context: contexts.Context | None


@dataclass(frozen=True, eq=False)
class FluxForward:
    """Arguments of one forward pass: states (b, n, C), their ids, text embeddings (b, L, D) and ids, timestep (b,).

    tables: as of the stage; None where the pass computes some rows alone.
    """

    states: Tensor
    ids: Tensor
    text: Tensor
    text_ids: Tensor
    timestep: Tensor
    rows: slice | Tensor
    context: contexts.Context | None
    tables: contexts.Tables | None = None


class FluxBlocks(BlockAdapter):
    """An adapter of such a transformer; a family says where tokens lie and how arguments reach the transformer."""

    token_wise = True
    keeps_reference = True
    skips_blocks = True
    skips_tokens = True
    encodes_pixels = True
    measures_attention = True
    approximates_boxes = True
    blocks = "single_transformer_blocks"

    @staticmethod
    @abstractmethod
    def position_ids(
        state: EditState, layout: MixedLayout, reference_layout: MixedLayout, scale: float = 1.0
    ) -> Tensor:
        """Position ids (N, axes) float32 of target and references. scale: of rows and columns."""

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        return 0, 0  # rows and columns of every image count from its first token

    @abstractmethod
    def forward(self, run: Run, prompt: FluxPrompt, inputs: FluxForward) -> Tensor:
        """The transformer's output (b, n, C)."""

    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        conditioning, rows = run.state.conditioning, len(group.rows)
        stage = self._stage_inputs(run, group, stores=bool(partial) or group.mass is not None)
        context = stage.context
        if group.mass is not None:
            context = Measuring(
                whole=context, mass=group.mass, texts=(run.state.text_tokens,), target=group.tokens.shape[1],
                reference=group.reference.shape[1],
            )  # fmt: skip
        timestep = torch.full((rows,), sigma * 1000, device=group.tokens.device, dtype=torch.float32)
        states = torch.cat([group.tokens, group.reference], 1).to(conditioning.dtype)
        prompts = conditioning.prompts(active_branches(run.state, run.config, sigma))
        outputs = []
        for prompt, call in zip(prompts, partial or [None] * len(prompts), strict=True):
            inputs = FluxForward(
                states, stage.ids, prompt.embeds[stage.rows], prompt.text_ids,
                timestep.to(conditioning.dtype) / 1000, stage.rows, context, stage.tables,
            )  # fmt: skip
            if call is not None:
                inputs = partial_inputs(inputs, call, run.state.text_tokens, group.tokens.shape[1])
            with at_step(run, group, sigma, rows, prompt):
                output = self.forward(run, prompt, inputs)
            outputs.append(output[:, : group.tokens.shape[1]].float())
        return outputs

    def _stage_inputs(self, run: Run, group: LayoutGroup, stores: bool) -> StageInputs:
        """Made by the first step of a stage. stores: a cache needs our own attention, also where stock's would do."""
        if stores not in group.inputs:
            ids = self.position_ids(run.state, group.layout, group.reference_layout)
            tables, rows = self._tables(run, ids), rows_index(group.rows, run.state.device)
            group.inputs[stores] = StageInputs(ids, tables, rows, self._context(run, group, tables, stores))
        return group.inputs[stores]

    def _context(self, run: Run, group: LayoutGroup, whole: contexts.Tables, stores: bool) -> contexts.Context | None:
        """The attention context, or None for a stock call. whole: the stage's tables."""
        state, config, layout, beside = run.state, run.config, group.layout, group.reference_layout
        area = torch.cat([layout.area, beside.area]).to(state.device)
        target, mixed = len(layout.area), layout.is_mixed or beside.is_mixed
        text = torch.zeros(state.text_tokens, device=area.device)
        bias = torch.cat([text, area.log()]) if mixed and config.key_bias == "area" else None
        own = mixed or stores or config.attention != "auto" or group.blocks is not None
        needed = bias is not None if config.attention == "stock" else own or state.trims_last_block
        if not needed:
            return None
        index = torch.arange(len(text) + len(area), device=area.device)
        rows = sequences.QueryRows(index[:target], before=index[: len(text)])
        tables = halves(whole)
        if config.attention == "stock":
            return contexts.Masked(rotary=tables, index=index, key_bias=bias)
        if not own:
            return contexts.Stock(rotary=tables, output_rows=rows)
        aligned = None
        if mixed and config.rope == "phase_aligned":
            segments = sequences.segments(torch.cat([text > 0, area > 1]))
            rows = replace(rows, segments=sequences.segments(area[:target] > 1, [target], [len(index)]))
            aligned = contexts.PhaseAligned(self._rotary(run, self.position_ids(state, layout, beside, 0.5)), segments)
        return contexts.Mixed(
            rotary=tables, index=index, key_bias=bias, aligned=aligned, backend=state.backend, blocks=group.blocks,
            output_rows=rows if state.trims_last_block else None,
        ).with_plan(len(group.tokens), state.conditioning.dtype)  # fmt: skip

    @staticmethod
    def _tables(run: Run, ids: Tensor) -> contexts.Tables:
        """The model's own tables of text and images."""
        text_ids = run.state.conditioning.positive.text_ids
        tables: contexts.Tables = run.pipe.transformer.pos_embed(torch.cat([text_ids.to(ids), ids]))
        return tables

    def _rotary(self, run: Run, ids: Tensor) -> contexts.Tables:
        """The same as contexts take them."""
        return halves(self._tables(run, ids))

    # --------------------------------------------------------------------------------------- features and images

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        return decoder_features(pipe.vae, self._latents(pipe, tokens, grid))

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return tokens.to(state.conditioning.dtype)
        image = pipe.vae.decode(self._latents(pipe, tokens, state.grid), return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type=output_type)

    def decode_edited(
        self, pipe: Any, state: EditState, tokens: Tensor, output_type: str, cells: Tensor
    ) -> tuple[Any, float]:
        latents, cell = self._latents(pipe, tokens, state.grid), 2 * state.grid.geometry.patch
        part = decode_boxes.decoded_part(pipe.vae, latents, cells, cell)
        if part is not None:
            return pipe.image_processor.postprocess(part[0], output_type=output_type), part[1]
        return self.decode(pipe, state, tokens, output_type), 1.0

    def encode(self, pipe: Any, pictures: Tensor, grid: TokenGrid) -> Tensor:
        return grid.geometry.from_image(self.encoded(pipe, pictures))

    @staticmethod
    def _latents(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        side = pixels_per_token(pipe)
        latents = pipe._unpack_latents(tokens, grid.height * side, grid.width * side, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return latents.to(decoder_dtype(pipe.vae))


def halves(tables: contexts.Tables) -> contexts.Tables:
    cos, sin = tables
    return processors.half_table(cos), processors.half_table(sin)


def partial_inputs(inputs: FluxForward, call: PartialForward, text: int, target: int) -> FluxForward:
    """Arguments of a call that stores keys and values, or computes some tokens with those of the others stored."""
    call.store.text_tokens = text
    whole, entries, batch = inputs.context, call.store.entries, len(inputs.states)
    trimmed = whole.output_rows
    if not call.partial:
        return replace(inputs, context=kept_keys.Storing(whole=whole, entries=entries))
    inputs = replace(inputs, tables=None)
    if call.target:
        rows = torch.arange(text, text + target, device=inputs.ids.device).expand(batch, -1)
        context = kept_keys.Partial(
            whole=whole, entries=entries, rows=rows, index=whole.index,
            rotary=tuple(table[text : text + target] for table in whole.rotary),
            query_rows=sequences.QueryRows(whole.index[:target]),
            output_rows=None if trimmed is None else replace(trimmed, before=whole.index[:0]),
        )  # fmt: skip
        return replace(
            inputs, states=inputs.states[:, :target], ids=inputs.ids[:target], text=inputs.text[:, :0],
            text_ids=inputs.text_ids[:0], context=context,
        )  # fmt: skip
    rows = torch.arange(text, device=inputs.ids.device).expand(batch, -1)
    rows = torch.cat([rows, text + call.index], 1)  # (b, text + m) of the joint sequence
    context = kept_keys.Partial(
        whole=whole, entries=entries, rows=rows, index=whole.index,
        rotary=tuple(table[rows] for table in whole.rotary), query_rows=sequences.QueryRows(rows[0]),
        output_rows=None if trimmed is None else sequences.QueryRows(call.index[0], before=whole.index[:text]),
        fused=fused_rows(call, whole, text, target),
    )  # fmt: skip
    # The processors take positions from the context, which has every sample's own; the ids only need the right length.
    index = call.index[..., None].expand(-1, -1, inputs.states.shape[2])
    return replace(
        inputs, states=inputs.states.gather(1, index), ids=inputs.ids[: call.index.shape[1]], context=context
    )


def fused_rows(call: PartialForward, whole: contexts.Mixed, text: int, target: int) -> FusedRows | None:
    """The rows of the joint sequence that a call's fusion names."""
    if call.fusion is None:
        return None
    rows, sources = text + call.fusion.target, text + target + call.fusion.reference
    return FusedRows.between(rows, sources, whole.rotary, (rows, sources), call.fusion.weight)


def attention_kwargs(context: contexts.Context | None, dtype: torch.dtype) -> dict[str, Any]:
    """How a context reaches attention; the model's own processors take a bias as a mask."""
    if context is None:
        return {}
    if isinstance(context, contexts.Masked):
        return {"attention_mask": context.key_bias.to(dtype)[None, None, None]}
    return {"specedit": context}


def image_ids(positions: Tensor, image: int) -> Tensor:
    """Position ids (N, 3) float32: image index, row, column. bf16 would round 200.5."""
    return torch.cat([torch.full_like(positions[:, :1], image), positions], 1)

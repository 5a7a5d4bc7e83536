"""One evaluation of Qwen-Image's transformer over any token layout, under one prompt or several at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ...forecast.kv_cache import Fusion, PartialForward
from ...method.adapter import LayoutGroup, Run, rows_index
from ..attention import contexts, kept_keys
from ..attention.fused_rows import FusedRows
from ..attention.measuring import Measuring
from ..attention.sequences import QueryRows, cumulative, pack, segments
from ..shared.modulation import at_step
from .positions import ImgShapesWithFreqs, all_positions, angles, phases, text_offset
from .prompts import QwenPrompt

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sequences:
    """Packed sequences, as the transformer is given them in every step of a stage.

    placed: the images' positions. texts: which of a prompt's embeddings (rows and tokens flattened) are the words of
    the sequences, for each prompt. lengths: words of every sequence. count: of sequences, with `target` target tokens
    each. length: of all of them.
    """

    placed: ImgShapesWithFreqs
    context: contexts.Packed | kept_keys.Partial
    texts: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    count: int
    target: int
    length: int

    @cached_property
    def target_alone(self) -> Sequences:
        """Inputs of a call for the target's tokens alone, with the stored keys and values of all others."""
        text, device = len(self.context.packing.text), self.context.packing.text.device
        index = torch.arange(self.count * self.target, device=device)
        ends = self.target * torch.arange(self.count + 1, dtype=torch.int32, device=device)
        tables = tuple(table[text : text + len(index)] for table in self.context.rotary)
        query_rows = self.context.planned(QueryRows(index, cu_seqlens=ends))
        partial = kept_keys.Partial(
            whole=self.context,
            entries={},  # each step brings its branch's own
            rows=self.context.packing.image[None, : len(index)],
            rotary=tables,
            index=index,
            query_rows=query_rows,
            output_rows=None if self.context.output_rows is None else query_rows,
        )
        placed = ImgShapesWithFreqs(len(index), 0, 1, tables)
        return dataclasses.replace(self, placed=placed, context=partial, texts=tuple(t[:0] for t in self.texts))

    def some(self, index: Tensor) -> Sequences:
        """Inputs of a call for the texts and the target tokens `index` (b, m), with the stored keys and values of all
        others."""
        whole, device, m = self.context, index.device, index.shape[1]
        text, image = whole.packing.text, self._image_rows(index, self.target, 0)
        packing, at = pack(list(self.lengths), m, 0, device), whole.packing.image[image]
        rows = packing.join(torch.cat([text, at])[None])
        stream = torch.cat([torch.arange(len(text), device=device), len(text) + image])
        tables = tuple(table[stream] for table in whole.rotary)
        output_rows = None
        if whole.output_rows is not None:
            output_rows = whole.planned(QueryRows(at, cu_seqlens=cumulative([m] * self.count, device)))
        context = kept_keys.Partial(
            whole=whole, entries={}, rows=rows, rotary=tables, index=torch.arange(rows.shape[1], device=device),
            query_rows=whole.planned(packing), output_rows=output_rows, packing=packing,
        )  # fmt: skip
        return dataclasses.replace(self, placed=ImgShapesWithFreqs(len(image), 0, 1, tables), context=context, target=m)

    def _image_rows(self, index: Tensor, each: int, first: int) -> Tensor:
        """(count * m,) rows of the image stream: tokens `index` (b, m) of every sequence, which has `each` of the kind
        that begins at row `first`."""
        number = torch.arange(self.count, device=index.device)[:, None]
        return (first + each * number + index.repeat(self.count // len(index), 1)).flatten()

    def fused(self, fusion: Fusion | None) -> FusedRows | None:
        """The rows of the packed sequence that a call's fusion names."""
        if fusion is None:
            return None
        whole, targets = self.context, self.count * self.target
        text, image = len(whole.packing.text), whole.packing.image
        target = self._image_rows(fusion.target, self.target, 0)
        source = self._image_rows(fusion.reference, (len(image) - targets) // self.count, targets)
        rows, sources, at = image[target][None], image[source][None], (text + target, text + source)
        return FusedRows.between(rows, sources, whole.rotary, at, fusion.weight)


@dataclass(frozen=True, eq=False)
class DenseInputs:
    """Sequences of one length, as the transformer is given them in every step of a stage.

    rows: of the prompt's embeddings. mask: of the text's padding, or None.
    """

    placed: ImgShapesWithFreqs
    context: contexts.Context | None
    rows: slice | Tensor
    mask: Tensor | None


class QwenForward:
    """The tokens of a step and where they lie, and the two ways to run prompts over them: `packed` and `dense`."""

    def __init__(self, run: Run, group: LayoutGroup, sigma: float):
        self.run, self.group, self.sigma = run, group, sigma
        self.layouts = group.layout, group.reference_layout
        self.mixed = any(layout.is_mixed for layout in self.layouts)

    def packed(self, prompts: list[QwenPrompt], call: PartialForward | None = None) -> list[Tensor]:
        """Velocities (b, N, C) float32 under each prompt: every sample under every prompt is a sequence of one pass.

        The streams are [texts of all sequences] and [targets of all | references of all]; in attention each sequence
        is [text | target | reference] by itself, and no token is padding. call: None, or how the KV cache is used.
        """
        sequences, b = self._stage_inputs("packed", prompts, self._packed), len(self.group.tokens)
        images, context = [self.group.tokens, self.group.reference], sequences.context
        if call is not None and call.partial:
            fused = sequences.fused(call.fusion)
            sequences, images = self._partial(sequences, call)
            call.store.keep(sequences.length)
            context = dataclasses.replace(sequences.context, entries=call.store.entries, fused=fused)
        elif call is not None:
            context = kept_keys.Storing(whole=context, entries=call.store.entries)
        elif (mass := self.group.mass) is not None:
            sizes = dict(target=sequences.target, reference=self.group.reference.shape[1])
            context = Measuring(whole=context, mass=mass, texts=sequences.lengths, **sizes)
        words = [prompt.embeds.flatten(0, 1)[at] for prompt, at in zip(prompts, sequences.texts, strict=True)]
        states = torch.cat([x.repeat(len(prompts), 1, 1).flatten(0, 1) for x in images])[None]
        out = self._run(states, torch.cat(words)[None], sequences.placed, context)
        n = sequences.target
        return list(out[0, : sequences.count * n].unflatten(0, (len(prompts), b, n)))

    def _partial(self, sequences: Sequences, call: PartialForward) -> tuple[Sequences, list[Tensor]]:
        """What a call computes that takes the keys and values of all other tokens from its store."""
        tokens, index, inputs = self.group.tokens, call.index, self.group.inputs
        if index is None:
            return sequences.target_alone, [tokens]
        of = (sequences, index)
        made = inputs.get("some")
        if made is None or any(a is not b for a, b in zip(made[0], of, strict=True)):  # other tokens than before
            made = inputs["some"] = of, sequences.some(index)
        return made[1], [tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))]

    def dense(self, prompt: QwenPrompt) -> Tensor:
        """Velocity (b, N, C) float32 under one prompt, by the model's own processors.

        Those take no bias per key, so where there is one its sum goes to the model's attention backend as a mask.
        """
        inputs = self._stage_inputs("dense", [prompt], self._dense)
        states = torch.cat([self.group.tokens, self.group.reference], 1)
        out = self._run(states, prompt.embeds[inputs.rows], inputs.placed, inputs.context, inputs.mask)
        return out[:, : self.group.tokens.shape[1]]

    def _stage_inputs(self, kind: str, prompts: list[QwenPrompt], make: Callable[[list[QwenPrompt]], T]) -> T:
        """Made by the first step of a stage for all of them. A callback may replace embeddings by longer ones."""
        key = (kind, *((prompt, prompt.embeds.shape[1]) for prompt in prompts))
        if key not in self.group.inputs:
            self.group.inputs[key] = make(prompts)
        return self.group.inputs[key]

    def _packed(self, prompts: list[QwenPrompt]) -> Sequences:
        (n, r), device = (layout.tokens for layout in self.layouts), self.group.tokens.device
        texts, indices, lengths = [], [], []
        for prompt in prompts:
            text, index, count = text_rows(prompt, self.group.rows)
            texts.append(text)
            indices.append(index)
            lengths += count
        count = len(lengths)
        packing = pack(lengths, n, r, device)
        text_at = self._text_positions(torch.cat(indices))
        whole = [length + n + r for length in lengths]

        def stream(target: Tensor, reference: Tensor) -> Tensor:
            """One row for each image token of the stream."""
            return torch.cat([part.repeat(count, *[1] * (part.ndim - 1)) for part in (target, reference)])

        def tables(scale: float) -> tuple[Tensor, Tensor]:
            image_at = stream(*(_scaled(at, scale) for at in self._positions))
            angle = angles(self.run.pipe.transformer.pos_embed, torch.cat([text_at, image_at]))
            return angle.cos(), angle.sin()

        area = stream(*self._area)
        bias = aligned = asked = None
        if self._biased:
            bias = torch.zeros(sum(whole), device=device)
            bias[packing.image] = area.log()
            bias = bias[None]
        if self.mixed and self.run.config.rope == "phase_aligned":
            is_coarse = torch.zeros(sum(whole), dtype=torch.bool, device=device)
            is_coarse[packing.image] = area > 1
            aligned = contexts.PhaseAligned(tables(0.5), segments(is_coarse, whole))
            asked = segments(area[: count * n] > 1, [n] * count, whole)
        output_rows = None
        if self.run.state.trims_last_block:
            output_rows = QueryRows(packing.image[: count * n], asked, cumulative([n] * count, device))
        rotary = tables(1.0)
        context = contexts.Packed(
            rotary=rotary, key_bias=bias, aligned=aligned, backend=self.run.state.backend, output_rows=output_rows,
            blocks=self.group.blocks, packing=packing, dtype=prompts[0].embeds.dtype,
        ).with_plans()  # fmt: skip
        placed = ImgShapesWithFreqs(count * n, count * r, 1, rotary)
        return Sequences(placed, context, tuple(texts), tuple(lengths), count, target=n, length=sum(whole))

    def _dense(self, prompts: list[QwenPrompt]) -> DenseInputs:
        (prompt,) = prompts
        (b, n, _), r, length = self.group.tokens.shape, self.group.reference.shape[1], prompt.embeds.shape[1]
        device = self.group.tokens.device
        mask = None if prompt.mask is None else prompt.mask[self.group.rows]
        text_at = self._text_positions(torch.arange(length, device=device))
        angle = angles(self.run.pipe.transformer.pos_embed, torch.cat([text_at, *self._positions]))
        tables, context = (angle.cos(), angle.sin()), None
        if self._biased:
            frequencies = tables
            text = torch.zeros(b, length, device=device)
            if mask is not None:
                text = text.masked_fill(~mask, -torch.inf)
            bias = torch.cat([text, torch.cat(self._area).log().expand(b, -1)], 1)
            context = contexts.Masked(rotary=tables, index=torch.arange(bias.shape[1], device=device), key_bias=bias)
        else:
            frequencies = phases(angle[length:]), phases(angle[:length])
            if self.run.state.trims_last_block:
                context = contexts.Stock(rotary=tables, output_rows=QueryRows(torch.arange(n, device=device)))
        placed, rows = ImgShapesWithFreqs(n, r, b, frequencies), rows_index(self.group.rows, device)
        return DenseInputs(placed, context, rows, mask)

    @cached_property
    def _positions(self) -> list[Tensor]:
        """Of the target's tokens and the references'."""
        places = all_positions(*self.layouts, self.run.pipe.transformer.pos_embed.scale_rope)
        return [at.to(self.group.tokens.device) for at in places]

    @cached_property
    def _area(self) -> list[Tensor]:
        layout, references = self.layouts
        area = [layout.area, torch.cat([part.area for part in references.layouts])]
        return [each.to(self.group.tokens.device) for each in area]

    @property
    def _biased(self) -> bool:
        return self.mixed and self.run.config.key_bias == "area"

    def _text_positions(self, index: Tensor) -> Tensor:
        """(L, 3): text lies beyond the images, at the same number on every axis."""
        offset = text_offset(*self.layouts, self.run.pipe.transformer.pos_embed.scale_rope)
        return (offset + index).float()[:, None].expand(-1, 3)

    def _run(
        self, states: Tensor, embeds: Tensor, placed: ImgShapesWithFreqs, context: contexts.Context | None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        conditioning = self.run.state.conditioning
        dtype = conditioning.dtype
        timestep = torch.full((len(states),), self.sigma * 1000, device=states.device, dtype=torch.float32)
        extra = {} if context is None else {"specedit": context}
        with at_step(self.run, self.group, self.sigma, len(states)):
            out: Tensor = self.run.pipe.transformer(
                hidden_states=states.to(dtype),
                timestep=timestep.to(dtype) / 1000,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=placed,
                attention_kwargs=conditioning.kwargs | extra,  # a copy, since the transformer pops the LoRA scale
                return_dict=False,
            )[0]
        return out.float()


def text_rows(prompt: QwenPrompt, rows: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The words of the samples `rows`, one sample after the other without padding: where they stand among the prompt's
    flattened embeddings (T,), their index in the text, and how many each sample has."""
    batch, longest = prompt.embeds.shape[:2]
    mask, device = prompt.mask, prompt.embeds.device
    place = torch.arange(batch * longest, device=device).view(batch, longest)[rows]
    index = torch.arange(longest, device=device).expand(len(rows), -1)
    if mask is None:
        return place.flatten(), index.flatten(), [longest] * len(rows)
    mask = mask[rows]
    return place[mask], index[mask], [prompt.lengths[row] for row in rows]


def _scaled(positions: Tensor, scale: float) -> Tensor:
    """Rows and columns at another scale, in the same frame."""
    return torch.cat([positions[:, :1], positions[:, 1:] * scale], 1)


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """True classifier-free guidance, rescaled to the norm that each token's velocity has under the prompt alone."""
    combined = negative + scale * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

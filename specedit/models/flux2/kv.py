"""FLUX.2-klein-KV: the references attend to nothing but each other, at a timestep of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import Flux2KleinKVPipeline
from torch import Tensor

from ...forecast.toca import PartialForward
from ...layout import MixedLayout
from ...method.adapter import LayoutGroup, Run, rows_index
from ...modules import modules_of
from ...released import Released
from ..attention import contexts, sequences
from ..attention.contexts import Context
from ..attention.sequences import Tables
from ..registry import register_adapter
from ..shared.flux_blocks import FluxForward
from ..shared.modulation import at_step
from .edit import Flux2Unpacked, transformer_inputs
from .kv_attention import BesideReference, KeptReference, WithoutReference, WithReference, plain_processor


@dataclass(frozen=True, eq=False)
class KVStage:
    """What the transformer is given alike in every step of a stage.

    ids: (N, 4) of references and target, and `own` of the target alone. computes, finds, alone: contexts of the call
    that computes the references, of those that find them, and of those without text; None in stock calls.
    """

    rows: slice | Tensor
    ids: Tensor
    own: Tensor
    computes: WithReference | None
    finds: WithoutReference | None
    alone: WithoutReference | None


@register_adapter
class Flux2KleinKV(Flux2Unpacked):
    """Adapter of Flux2KleinKVPipeline.

    The first step of a stage computes the references at the stage's layout, and all others find their keys and values,
    as in the stock call. That is exact; `reference_refresh` keeps the text's too.
    """

    name = "flux2-klein-kv"
    pipelines = "Flux2KleinKVPipeline"
    released = (Released("flux2-klein-9b-kv", "FLUX.2-klein-KV, 9B", ("flux.2-klein", "kv")),)
    token_wise = skips_tokens = skips_blocks = measures_attention = False  # its processors keep references only
    fixed_reference = True
    runs_others = False  # a mask, which stock attention takes a bias as, is nothing that its processors pass on

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, Flux2KleinKVPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if (reason := super().refusal(pipe, call, attention)) is not None:
            return reason
        plain = (name for name in map(plain_processor, modules_of(pipe.transformer)) if name is not None)
        name = next(plain, None)
        return None if name is None else f"its attention processor {name} keeps no references"

    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        conditioning, inputs = run.state.conditioning, group.inputs
        stage, kept = self.stage(run, group, keeps_text=bool(partial)), ("kept", bool(partial))
        timestep = torch.full((len(group.rows),), sigma * 1000, device=group.tokens.device, dtype=torch.float32)
        prompt, alone = conditioning.positive, partial is not None and partial[0].target
        forward = FluxForward(
            group.tokens.to(conditioning.dtype), stage.own, prompt.embeds[stage.rows], prompt.text_ids,
            timestep.to(conditioning.dtype) / 1000, stage.rows, stage.finds,
        )  # fmt: skip
        if kept not in inputs:
            states = torch.cat([group.reference, group.tokens], 1).to(conditioning.dtype)
            forward = replace(forward, states=states, ids=stage.ids, context=stage.computes)
            output, cache = run.pipe.transformer(
                **transformer_inputs(run, forward), kv_cache_mode="extract", num_ref_tokens=group.reference.shape[1],
                return_dict=False,
            )  # fmt: skip
            inputs[kept] = KeptReference(cache=cache)
            return [output.float()]
        if alone:
            forward = replace(forward, text=forward.text[:, :0], text_ids=forward.text_ids[:0], context=stage.alone)
        # The call before has the references' timestep too, and makes both modulations itself.
        with at_step(run, group, sigma, len(group.rows)):
            output = run.pipe.transformer(
                **transformer_inputs(run, forward), kv_cache=inputs[kept].cache, kv_cache_mode="cached",
                return_dict=False,
            )[0]  # fmt: skip
        return [output.float()]

    def stage(self, run: Run, group: LayoutGroup, keeps_text: bool) -> KVStage:
        """Made by the first step of a stage."""
        if keeps_text not in group.inputs:
            group.inputs[keeps_text] = self._stage(run, group, keeps_text)
        return group.inputs[keeps_text]

    def _stage(self, run: Run, group: LayoutGroup, keeps_text: bool) -> KVStage:
        state, layout, beside = run.state, group.layout, group.reference_layout

        def joined(scale: float = 1.0) -> Tensor:
            """Ids of references and target."""
            ids = self.position_ids(state, layout, beside, scale)
            return torch.cat([ids[layout.tokens :], ids[: layout.tokens]])

        rows, ids = rows_index(group.rows, state.device), joined()
        own = ids[beside.tokens :]
        found = _Contexts(run, len(group.rows), layout, beside.layouts, keeps_text)
        if not found.needed:
            return KVStage(rows, ids, own, None, None, None)
        fine = self._rotary(run, ids)
        coarse = self._rotary(run, joined(0.5)) if found.aligned else None
        return KVStage(rows, ids, own, *found.make(fine, coarse))


class _Contexts:
    """Makes the attention contexts of a stage."""

    def __init__(self, run: Run, batch: int, layout: MixedLayout, beside: tuple[MixedLayout, ...], keeps_text: bool):
        state, config = run.state, run.config
        self.run, self.batch, self.keeps_text, device = run, batch, keeps_text, state.device
        self.text = torch.zeros(int(state.text_tokens), device=device)
        self.references = torch.cat([one.area for one in beside]).to(device).log()
        self.target = layout.area.to(device).log()
        mixed = layout.is_mixed or any(one.is_mixed for one in beside)
        self.biased = mixed and config.key_bias == "area"
        self.aligned = mixed and config.rope == "phase_aligned"
        self.own = mixed or keeps_text or config.attention != "auto"
        only_biased = config.attention == "stock"
        self.needed = self.biased if only_biased else self.own or state.trims_last_block
        self.index = torch.arange(sum(map(len, (self.text, self.references, self.target))), device=device)

    def make(self, fine: Tables, coarse: Tables | None) -> tuple[WithReference, WithoutReference, WithoutReference]:
        """Of the call that computes the references, of one that finds them, and of one over the target alone."""
        text, references, target = self.text, self.references, self.target
        before = len(text) + len(references)
        words, own = slice(0, len(text)), slice(before, before + len(target))

        def tables(*spans: slice) -> dict[str, Any]:
            def some(pair: Tables) -> Tables:
                cos, sin = (torch.cat([table[span] for span in spans]) for table in pair)
                return cos, sin

            return dict(rotary=some(fine), coarse=None if coarse is None else some(coarse))

        keys = torch.cat([text, references, target])
        every = self.attention(torch.cat([text, target]), keys, **tables(slice(0, own.stop)))
        among = self.attention(references, references, **tables(slice(len(text), before)))

        def beside(kind: type[BesideReference], text: int, before: int, *spans: slice, **more: Any) -> Any:
            return kind(
                **tables(*spans), index=self.index, every=every, text=self.index[:text], keeps_text=self.keeps_text,
                output_rows=self.output_rows(before, every), **more,
            )  # fmt: skip

        return (
            beside(
                WithReference, len(text), before, slice(0, own.stop), among=among,
                references=self.index[: len(references)],
            ),
            beside(WithoutReference, len(text), len(text), words, own),
            beside(WithoutReference, 0, 0, own),
        )  # fmt: skip

    def attention(self, queries: Tensor, keys: Tensor, rotary: Tables, coarse: Tables | None) -> Context:
        """How rows attend to keys, both given by the logarithm of their areas. Only keys have a bias.

        rotary, coarse: tables of the keys. A call has those of its rows in its own context.
        """
        bias = keys if self.biased else None
        if self.run.config.attention == "stock":
            assert bias is not None
            return contexts.Masked(rotary=rotary, index=self.index, key_bias=bias)
        if not self.own:
            return contexts.Stock(rotary=rotary, output_rows=sequences.QueryRows(self.index[: len(self.target)]))
        aligned = None
        if coarse is not None:
            segments = sequences.segments(queries > 0, [len(queries)], [len(keys)])
            aligned = contexts.PhaseAligned(coarse, segments)
        mixed = contexts.Mixed(
            rotary=rotary, index=self.index, key_bias=bias, aligned=aligned, backend=self.run.state.backend
        )
        return mixed.with_plan(self.batch, self.run.state.conditioning.dtype, queries=len(queries))

    def output_rows(self, before: int, every: Context) -> sequences.QueryRows | None:
        """The target's rows, behind so many others and attending as `every` says; None where the last block computes
        all."""
        if not self.run.state.trims_last_block:
            return None
        target = self.target
        segments = None
        if self.aligned:
            segments = sequences.segments(target > 0, [len(target)], [len(self.index)])
            if isinstance(every, contexts.Mixed):
                segments = every.planned_segments(segments, self.run.state.conditioning.dtype)
        return sequences.QueryRows(self.index[: len(target)], segments, before=self.index[:before])

"""What a mixed sequence adds to an attention call, as one class for each kind of call.

Stock    the model's own processors, except for the last block
Masked   the model's own attention backend, with the bias as its mask
Mixed    dense sequences [text | target | reference] through specedit_kernels
Packed   sequences of different length, back to back, through specedit_kernels
Storing, Partial (in `kept_keys`)  calls that keep keys and values, and calls of some rows that read them
Measuring (in `measuring`)  a Mixed or Packed call that says how much attention the reference's tokens get

A context travels in `joint_attention_kwargs` and serves every block of every step of a stage. Rotary tables are cos and
sin (S, D/2) float32, as the kernel takes them, the text stream's rows before the image stream's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from specedit_kernels import AttentionPlan, KeyGroups, attention_backend, mixed_attention, plan
from specedit_kernels.key_groups import NotMergeable

from ...method.sparse_blocks import BlockPredictor
from .sequences import Movable, Packing, Pair, QueryRows, Segments, Tables, mark_all_dynamic

Queries = TypeVar("Queries", QueryRows, Packing)


class Rotated(NamedTuple):
    """Queries and keys (b, n, H, D) at one scale."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True, eq=False)
class PhaseAligned(Movable):
    """Coarse queries see all positions at the coarse scale: its tables, and which queries are coarse."""

    rotary: Tables
    segments: Segments


class Context(Movable):
    """The interface that the processors use.

    rotary: tables of the call's rows. index: (S,) int64 from 0 to S - 1, made once and not in every block.
    output_rows: the rows whose output is used after the last block, or None for all.
    """

    rotary: Tables
    index: Tensor
    output_rows: QueryRows | None

    @property
    def is_stock(self) -> bool:
        """Whether the model's own processors do the same, in every block but the last."""
        return False

    def __post_init__(self) -> None:
        # Every edit has other lengths, and the first graph should serve them all.
        mark_all_dynamic(self)

    @property
    def kernels(self) -> str | None:
        """The backend of specedit_kernels that norms and rotates."""
        return None

    @property
    def scales(self) -> tuple[Tables, ...]:
        """The tables of every scale at which queries may see the keys."""
        return (self.rotary,)

    def for_graph(self, block: dict[str, Any]) -> dict[str, Any]:
        """Of a compiled block's arguments those to replace, so that one graph serves every edit."""
        return {}

    @property
    def in_order(self) -> bool:
        """Whether a call's only stream lists its rows as the joint sequence does."""
        return True

    def places(self, text: int, image: int) -> tuple[Tensor, Tensor]:
        """Where the rows of the image's and the text's stream lie in the joint sequence."""
        return self.index[text : text + image], self.index[:text]

    def join(self, image: Tensor, *text: Tensor) -> Tensor:
        """The joint sequence (b, n, H, D) of the streams' rows."""
        return torch.cat([*text, image], 1)

    def split(self, joint: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """The image's and the text's rows of a joint sequence."""
        return joint[:, text:], joint[:, :text]

    def update_kv_cache(self, attn: nn.Module, k: Tensor, v: Tensor, beside: Pair | None = None) -> Pair:
        """Keys and values of the whole sequence, from those of the call's rows. beside: those before the sequence."""
        return k, v

    def with_kept(self, owner: Any, scales: list[Rotated], v: Tensor) -> tuple[list[Rotated], Tensor]:
        """Keys of the whole sequence at every scale, and its values. owner: what the kept ones belong to."""
        k, v = self.update_kv_cache(owner, scales[0].k, v)
        return [Rotated(scales[0].q, k), *scales[1:]], v

    def attend(
        self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | Packing | None, processor: Any
    ) -> Tensor:
        """Attention output (b, n, H, D). query_rows: which rows the queries are, or None for all."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Stock(Context):
    """The model's own processors run in every block but the last, which computes the rows that are read."""

    rotary: Tables
    output_rows: QueryRows

    @property
    def is_stock(self) -> bool:
        return True

    def attend(
        self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | Packing | None, processor: Any
    ) -> Tensor:
        return dispatched(scales[0], v, None, processor)


@dataclass(frozen=True, eq=False, kw_only=True)
class Masked(Context):
    """The model's own attention backend. key_bias: (S,) or (B, S) float32, its mask."""

    rotary: Tables
    index: Tensor
    key_bias: Tensor
    output_rows: ClassVar[None] = None

    @property
    def kernels(self) -> str:
        return "torch"

    def attend(
        self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | Packing | None, processor: Any
    ) -> Tensor:
        mask = self.key_bias.expand(len(v), -1)[:, None, None].to(v.dtype)
        return dispatched(scales[0], v, mask, processor)


@dataclass(frozen=True, eq=False, kw_only=True)
class ByKernels(Context):
    """Attention by specedit_kernels.

    key_bias: (S,) or (B, S) float32, log of the area of every key, or None for no bias. aligned: phase-aligned RoPE,
    or None for one scale. backend: of specedit_kernels, None for automatic. blocks: which blocks of keys are read, or
    None for all. groups: of the bias, which merged attention reads; made once, not in every block.
    """

    rotary: Tables
    key_bias: Tensor | None = None
    aligned: PhaseAligned | None = None
    backend: str | None = None
    output_rows: QueryRows | None = None
    blocks: BlockPredictor | None = None
    groups: KeyGroups | None = None

    def __post_init__(self) -> None:
        if self.groups is None and self.key_bias is not None:
            object.__setattr__(self, "groups", self._merged_groups(self.key_bias))
        super().__post_init__()

    def _merged_groups(self, key_bias: Tensor) -> KeyGroups | None:
        """The groups of a bias where attention is merged: by name, or where a GPU's kernel cannot be used."""
        if self.backend == "merged":
            return self.grouped(key_bias)
        if self.backend is not None or self.blocks is not None or attention_backend(key_bias.device) != "merged":
            return None
        try:
            return self.grouped(key_bias)
        except NotMergeable:
            return None

    def grouped(self, key_bias: Tensor) -> KeyGroups:
        """The groups of a bias, as `launch` takes them."""
        raise NotImplementedError

    def planned_segments(self, segments: Segments, dtype: torch.dtype) -> Segments:
        """Phase-aligned queries of a dtype with the plan of their attention: made once a stage, not in every block."""
        assert self.aligned is not None
        keys, half = self.aligned.rotary[0].shape
        bias = self.key_bias
        if bias is not None:  # of one sample, which all others share, or else each call brings its own
            bias = bias.flatten().repeat(2) if bias.numel() == keys else None
        made = plan(
            segments.cu_q, segments.cu_k, total_q=len(segments.order), total_k=2 * keys, head_dim=2 * half, dtype=dtype,
            key_bias=bias, backend=self.backend,
        )  # fmt: skip
        return replace(segments, plan=made)

    def with_planned_segments(self, dtype: torch.dtype) -> Self:
        """The same with plans for all phase-aligned queries, and for those whose output is used."""
        assert self.aligned is not None
        aligned = replace(self.aligned, segments=self.planned_segments(self.aligned.segments, dtype))
        rows = self.output_rows
        if rows is not None and rows.segments is not None:
            rows = replace(rows, segments=self.planned_segments(rows.segments, dtype))
        return replace(self, aligned=aligned, output_rows=rows)

    def biased(self, bias: Tensor | None) -> dict[str, Any]:
        """The bias as arguments of `mixed_attention`, and the backend that takes it."""
        if self.groups is not None:
            return {"key_groups": self.groups, "backend": "merged"}
        return {"key_bias": bias, "backend": self.backend}

    @property
    def kernels(self) -> str | None:
        return self.backend

    @property
    def scales(self) -> tuple[Tables, ...]:
        return (self.rotary,) if self.aligned is None else (self.rotary, self.aligned.rotary)

    def attend(
        self, scales: list[Rotated], v: Tensor, query_rows: QueryRows | Packing | None, processor: Any
    ) -> Tensor:
        bias = None if self.key_bias is None else self.key_bias.expand(len(v), -1)
        if self.aligned is None:
            return self.launch(scales[0], v, bias, query_rows)
        segments = query_rows.segments if isinstance(query_rows, QueryRows) else self.aligned.segments
        return launch_segments(*scales, v, bias, segments, self.backend)

    def launch(self, scale: Rotated, v: Tensor, bias: Tensor | None, query_rows: QueryRows | Packing | None) -> Tensor:
        """Attention at one scale."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixed(ByKernels):
    """Sequences of one length. plan: of their keys' bias, or None."""

    index: Tensor
    plan: AttentionPlan | None = None

    def with_plan(self, batch: int, dtype: torch.dtype, queries: int | None = None) -> Self:
        """The same with a plan for `batch` samples of queries of a dtype: made once a stage, not in every block.

        queries: of each sample; None: as many as keys.
        """
        if self.aligned is not None:
            return self.with_planned_segments(dtype)
        # Without a bias, sequences of one length leave nothing to plan; merged attention has its groups.
        if self.key_bias is None or self.groups is not None:
            return self
        bias = self.key_bias.expand(batch, -1)
        made = plan(
            total_q=bias.shape[1] if queries is None else queries, total_k=bias.shape[1],
            head_dim=2 * self.rotary[0].shape[-1], dtype=dtype, key_bias=bias, backend=self.backend,
        )  # fmt: skip
        return replace(self, plan=made)

    def grouped(self, key_bias: Tensor) -> KeyGroups:
        return KeyGroups.of(key_bias if key_bias.ndim == 2 else key_bias[None])

    def launch(self, scale: Rotated, v: Tensor, bias: Tensor | None, query_rows: QueryRows | Packing | None) -> Tensor:
        keep = None if self.blocks is None else self.blocks.dense(*scale)
        if self.plan is not None:
            return mixed_attention(*scale, v, plan=self.plan, block_keep=keep, backend=self.backend)
        return mixed_attention(*scale, v, block_keep=keep, **self.biased(bias))


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed(ByKernels):
    """Sequences of different length in one launch, a batch of one, whose rows lie as `packing` says.

    dtype: of the queries, for plans of their attention, or None for none.
    """

    packing: Packing
    dtype: torch.dtype | None = None

    def planned(self, queries: Queries) -> Queries:
        """These queries with the plan of their attention over all keys: made once a stage, not in every block."""
        if self.dtype is None or self.aligned is not None or self.groups is not None or queries.cu_seqlens is None:
            return queries
        made = plan(
            queries.cu_seqlens, self.packing.cu_seqlens, total_q=queries.total, total_k=self.packing.total,
            head_dim=2 * self.rotary[0].shape[-1], dtype=self.dtype, max_seqlen_q=queries.longest,
            key_bias=None if self.key_bias is None else self.key_bias[0], backend=self.backend,
        )  # fmt: skip
        return replace(queries, plan=made)

    def with_plans(self) -> Self:
        """The same with plans for all rows, and for those whose output is used."""
        if self.aligned is not None:
            return self if self.dtype is None else self.with_planned_segments(self.dtype)
        rows = None if self.output_rows is None else self.planned(self.output_rows)
        return replace(self, packing=self.planned(self.packing), output_rows=rows)

    def grouped(self, key_bias: Tensor) -> KeyGroups:
        return KeyGroups.of(key_bias.flatten(), self.packing.cu_seqlens)

    @property
    def in_order(self) -> bool:
        return False

    def places(self, text: int, image: int) -> tuple[Tensor, Tensor]:
        return self.packing.places

    def join(self, image: Tensor, *text: Tensor) -> Tensor:
        return self.packing.join(super().join(image, *text))

    def split(self, joint: Tensor, text: int) -> tuple[Tensor, Tensor]:
        return self.packing.split(joint)

    def launch(self, scale: Rotated, v: Tensor, bias: Tensor | None, query_rows: QueryRows | Packing | None) -> Tensor:
        queries = self.packing if query_rows is None else query_rows
        keep = None
        if self.blocks is not None:
            keep = self.blocks.packed(scale.q[0], scale.k[0], queries.cu_seqlens, self.packing.cu_seqlens)
        if queries.plan is not None:
            out = mixed_attention(
                scale.q[0], scale.k[0], v[0], plan=queries.plan, block_keep=keep, backend=self.backend
            )
            return out[None]
        return mixed_attention(
            scale.q[0], scale.k[0], v[0], cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=self.packing.cu_seqlens,
            max_seqlen_q=queries.longest, block_keep=keep,
            **self.biased(None if bias is None else bias[0].contiguous()),
        )[None]  # fmt: skip


def dispatched(scale: Rotated, v: Tensor, mask: Tensor | None, processor: Any) -> Tensor:
    """The model's own attention backend, which diffusers sets on the processor."""
    return dispatch_attention_fn(
        *scale, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )


def launch_segments(
    fine: Rotated, coarse: Rotated, v: Tensor, bias: Tensor | None, segments: Segments, backend: str | None
) -> Tensor:
    """Two query segments over two rotated copies of the keys, packed into one launch for each sample."""
    out, plan = torch.empty_like(fine.q), segments.plan
    how: dict[str, Any] = {"plan": plan}
    if plan is None:
        how = {"cu_seqlens_q": segments.cu_q, "cu_seqlens_k": segments.cu_k}
    elif plan.key_bias is not None:
        bias = None
    for b in range(len(v)):
        out[b, segments.order] = mixed_attention(
            torch.cat([fine.q[b, segments.fine], coarse.q[b, segments.coarse]]),
            torch.cat([fine.k[b], coarse.k[b]]),
            v[b].repeat(2, 1, 1),
            key_bias=None if bias is None else bias[b].repeat(2),
            backend=backend,
            **how,
        )
    return out

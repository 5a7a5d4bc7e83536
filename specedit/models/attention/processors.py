"""Attention over mixed sequences: processors that hand the layout to specedit_kernels, and otherwise step aside."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from specedit_kernels import mixed_attention, qk_norm_rope

from .contexts import MixedContext, QueryRows


class MixedProcessor:
    """Joint attention of text and image with a bias per key. Without a context it is the processor that it replaced.

    A model family says which processor is its stock one, and has a `__call__` with the arguments of that one. Its
    `rows`, a slice or None, are never compared with None: torch.compile would make constants of their ends, which every
    edit has others of.
    """

    stock: type

    def __init__(self, original: Any = None):  # diffusers makes new processors of a class without arguments
        self.original = original if original is not None else self.stock()

    # diffusers sets the attention backend on the processor that it finds.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value

    def mixed(self, rows: slice | None, *call: Any):
        """`joint` of `call`, or with `rows` of hidden_states these alone."""
        return self.read_rows(rows, *call) if isinstance(rows, slice) else self.joint(*call)

    def joint(
        self,
        attn: nn.Module,
        head_dim: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        coarse_rotary: tuple[Tensor, Tensor] | None,
        context: MixedContext,
    ):
        """Attention of both streams, as the stock processor returns it.

        rotary, coarse_rotary: cos and sin (rows, D/2) float32, those of the text's rows before those of the image's.
        """
        kernels = "torch" if context.backend == "stock" else context.backend
        streams = _streams(attn, hidden_states, encoder_hidden_states)
        batch, length = hidden_states.shape[0], sum(s[0].shape[1] for s in streams)
        places = None if context.packing is None else (context.packing.image, context.packing.text)
        index = context.index if context.index is not None else torch.arange(length, device=hidden_states.device)
        projected = [
            [x.unflatten(-1, (-1, head_dim)) for x in _projected(attn, names, states)]
            for states, _, names, _, _ in streams
        ]
        # Text and image are normed, rotated and placed side by side in one pass each.
        first = projected[0][0]
        shape = (batch, length, *first.shape[2:])
        joint = [first.new_empty(shape) for _ in range(3)]
        coarse = [first.new_empty(shape) for _ in range(2)] if context.segments is not None else None
        for i, ((states, start, _, norm_q, norm_k), (q, k, v)) in enumerate(zip(streams, projected, strict=True)):
            stop = start + states.shape[1]
            rows = index[start:stop] if places is None else places[i]
            tables = [(rotary, joint, v)] + ([(coarse_rotary, coarse, None)] if coarse is not None else [])
            for (cos, sin), out, values in tables:
                part = (cos[..., start:stop, :], sin[..., start:stop, :])
                _norm_rope_scatter(q, k, values, norm_q, norm_k, *part, out, rows, kernels)
        if context.store is not None:
            joint[1:] = _update_kv_cache(context, attn, *joint[1:])
        out = self._attend(joint, coarse, context, context.asking).flatten(2, 3).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        for_image, for_text = (out[:, text:], out[:, :text]) if places is None else (out[:, rows] for rows in places)
        return _output(attn, for_image), attn.to_add_out(for_text.contiguous()) if text else for_text

    def read_rows(
        self,
        rows: slice,
        attn: nn.Module,
        head_dim: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        coarse_rotary: tuple[Tensor, Tensor] | None,
        context: MixedContext,
    ) -> Tensor:
        """What `joint` gives `rows` of hidden_states, and nothing else: all others only serve as keys and values."""
        kernels = {"stock": None if context.plain else "torch"}.get(context.backend, context.backend)
        tables = [rotary] + ([coarse_rotary] if context.segments is not None else [])
        queries: list[Tensor] = []
        keys: list[list[Tensor]] = [[] for _ in tables]
        values: list[Tensor] = []
        streams = _streams(attn, hidden_states, encoder_hidden_states)
        projected = [
            [
                x if x is None else x.unflatten(-1, (-1, head_dim))
                for x in _projected(attn, names, states, rows if states is hidden_states else None)
            ]
            for states, _, names, _, _ in streams
        ]
        for (states, start, _, norm_q, norm_k), (q, k, v) in zip(streams, projected, strict=True):
            values.append(v)
            here, own = slice(start, start + states.shape[1]), slice(start + rows.start, start + rows.stop)
            for (cos, sin), placed in zip(tables, keys, strict=True):
                if q is not None:
                    queries.append(_norm_and_rotate(q, norm_q, cos[..., own, :], sin[..., own, :], kernels))
                placed.append(_norm_and_rotate(k, norm_k, cos[..., here, :], sin[..., here, :], kernels))
        v, *keys = (torch.cat(parts[::-1], 1) for parts in (values, *keys))  # text before image
        if context.packing is not None:
            order = torch.cat([context.packing.text, context.packing.image])
            v, *keys = (torch.empty_like(x).index_copy_(1, order, x) for x in (v, *keys))
        if context.store is not None:
            keys[0], v = _update_kv_cache(context, attn, keys[0], v)
        coarse = [queries[1], keys[1]] if len(tables) == 2 else None
        out = self._attend([queries[0], keys[0], v], coarse, context, context.read)
        out = out.flatten(2, 3).to(hidden_states.dtype)
        return out if encoder_hidden_states is None else _output(attn, out)

    def _attend(
        self, joint: list[Tensor], coarse: list[Tensor] | None, context: MixedContext, asking: QueryRows | None
    ) -> Tensor:
        q, k, v = joint
        bias = None if context.key_bias is None else context.key_bias.expand(q.shape[0], -1)
        if context.backend == "stock":
            mask = None if bias is None else bias[:, None, None].to(q.dtype)
            return dispatch_attention_fn(
                q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        if coarse is None and context.packing is None:
            return mixed_attention(q, k, v, key_bias=bias, backend=context.backend)
        if coarse is None:
            ends, longest = context.packing.cu_seqlens, context.packing.longest
            asked, longest = (ends, longest) if asking is None else (asking.cu_seqlens, asking.longest)
            return mixed_attention(
                q[0], k[0], v[0], cu_seqlens_q=asked, cu_seqlens_k=ends, max_seqlen_q=longest,
                key_bias=None if bias is None else bias[0].contiguous(), backend=context.backend,
            )[None]  # fmt: skip
        # Two query segments over two rotated copies of the keys, packed into one launch for each sample.
        out = torch.empty_like(q)
        parts = context.segments if asking is None else asking.segments
        for b in range(q.shape[0]):
            packed_q = torch.cat([q[b, parts.fine], coarse[0][b, parts.coarse]])
            packed_k = torch.cat([k[b], coarse[1][b]])
            packed_bias = None if bias is None else bias[b].repeat(2)
            out[b, parts.order] = mixed_attention(
                packed_q, packed_k, v[b].repeat(2, 1, 1), cu_seqlens_q=parts.cu_q, cu_seqlens_k=parts.cu_k,
                key_bias=packed_bias, backend=context.backend,
            )  # fmt: skip
        return out


class FluxMixedProcessor(MixedProcessor):
    """Of FLUX's double and single blocks."""

    stock = FluxAttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: MixedContext | None = None,
        rows: slice | None = None,
    ):
        if specedit is None or (specedit.plain and not isinstance(rows, slice)):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        rotary = half_tables(specedit.rotary or image_rotary_emb, attn.head_dim)
        coarse = None if specedit.coarse_rotary is None else half_tables(specedit.coarse_rotary, attn.head_dim)
        return self.mixed(rows, attn, attn.head_dim, hidden_states, encoder_hidden_states, rotary, coarse, specedit)


class QwenMixedProcessor(MixedProcessor):
    """Of Qwen-Image's double-stream blocks.

    With a context, `image_rotary_emb` and `coarse_rotary` are cos and sin (rows, D/2) float32, text before image; of a
    plain one, `rotary`.
    """

    stock = QwenDoubleStreamAttnProcessor2_0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: MixedContext | None = None,
        rows: slice | None = None,
    ):
        if specedit is None or (specedit.plain and not isinstance(rows, slice)):
            return self.original(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        head_dim = attn.inner_dim // attn.heads
        rotary, coarse = specedit.rotary or image_rotary_emb, specedit.coarse_rotary
        return self.mixed(rows, attn, head_dim, hidden_states, encoder_hidden_states, rotary, coarse, specedit)


def _norm_rope_scatter(q, k, v, norm_q, norm_k, cos, sin, out, rows: Tensor, backend: str | None) -> None:
    """Norm and rotate q and k, and write them (and v) into `rows` of the joint sequence."""
    if _weight_is_resident(norm_q, q) and _weight_is_resident(norm_k, k):
        weights = (norm_q.weight, norm_k.weight)
        qk_norm_rope(q, k, *weights, cos, sin, eps=norm_q.eps, v=v, out_index=rows, out=out, backend=backend)
        return
    for x, norm, target in ((q, norm_q, out[0]), (k, norm_k, out[1])):
        target[:, rows] = _rotate(norm(x), cos, sin).to(target.dtype)
    if v is not None:
        out[2][:, rows] = v


@torch.compiler.disable
def _update_kv_cache(context: MixedContext, attn: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence: these, or the kept ones with these in their rows."""
    module = id(attn)  # taken here, since the compiler would compile for each module's own
    if context.rows is not None:
        index = context.rows[..., None, None].expand_as(k)
        k, v = (kept.scatter(1, index, new) for kept, new in zip(context.store[module], (k, v), strict=True))
    context.store[module] = (k, v)
    return k, v


def _streams(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> list[tuple]:
    """Image and text, each with its states, where they begin in the joint sequence, the names of its projections, and
    the norms of queries and keys.

    In the order of the stock processors, which is not that of the sequence: offloading by leaves fetches each before it
    is called, as the first call went. A call for the target's tokens alone has no text.
    """
    length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    streams = [(hidden_states, length, ("to_q", "to_k", "to_v", "to_qkv"), attn.norm_q, attn.norm_k)]
    if length:
        names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv")
        streams.append((encoder_hidden_states, 0, names, attn.norm_added_q, attn.norm_added_k))
    return streams


def _projected(attn: nn.Module, names: tuple[str, ...], states: Tensor, rows: slice | None = slice(None)):
    """Queries (of some rows, or None of none), keys and values of states (b, n, C)."""
    *each, fused = names
    if getattr(attn, "fused_projections", False):  # one product gives all three, of rows that do not ask too
        q, k, v = getattr(attn, fused)(states).chunk(3, dim=-1)
        return q[:, rows] if isinstance(rows, slice) else None, k, v
    q, k, v = (getattr(attn, name) for name in each)
    return q(states[:, rows]) if isinstance(rows, slice) else None, k(states), v(states)


def _output(attn: nn.Module, image: Tensor) -> Tensor:
    image = attn.to_out[0](image.contiguous())
    return attn.to_out[1](image) if len(attn.to_out) > 1 else image  # dropout


def _norm_and_rotate(x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, backend: str | None) -> Tensor:
    """Normed and rotated x (b, n, H, D). The kernel does pairs; its second half is dropped."""
    if _weight_is_resident(norm, x):
        return qk_norm_rope(x, x, norm.weight, norm.weight, cos, sin, eps=norm.eps, backend=backend)[0]
    return _rotate(norm(x), cos, sin)


def _weight_is_resident(norm: nn.Module, x: Tensor) -> bool:
    """Whether the weights of `norm` are beside x. Of one that is offloaded by itself they come when it is called, and
    where they are on their way already, as under diffusers' streams, only its hook waits for them."""
    hooked = hasattr(norm, "_diffusers_hook") or hasattr(norm, "_hf_hook")
    return not hooked and norm.weight.device == x.device


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).to(x.dtype)


def half_tables(tables: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (S, dim / 2), from diffusers' (S, dim) or as they are."""
    return tuple(table if 2 * table.shape[-1] == dim else half_table(table) for table in tables)


def half_table(table: Tensor) -> Tensor:
    """diffusers lists every angle twice (S, D); the kernel takes it once (S, D/2), float32."""
    return table[:, ::2].float().contiguous()


def why_unsupported_processor(transformer: nn.Module, attention_class: type, backend: str | None) -> str | None:
    """Why a transformer runs stock, such as a quantised engine with kernels of its own, or one with processors that
    somebody else wrote; None of the model's own. `backend`: None where attention="stock" would not run those either,
    nor diffusers' own that have weights.
    """
    modules = [module for module in transformer.modules() if isinstance(module, attention_class)]
    if not modules:
        return f"the attention of {type(transformer).__name__} takes no processors of ours"
    for processor in (module.processor for module in modules):
        own = processor.original if isinstance(processor, MixedProcessor) else processor
        if backend != "stock" and not _of_diffusers(own):
            name = type(own).__name__
            hint = "" if backend is None else ', which attention="stock" would run'
            return f"its attention processor {name} is none of diffusers' own{hint}"
        if backend is None and isinstance(own, nn.Module):
            return "an attention processor with weights is loaded, and SpecEdit cannot stand in for it"
    return None


def _of_diffusers(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] == "diffusers"


def attach(transformer: nn.Module, attention_class: type, processor_class: type) -> None:
    """Wrap the processor of every attention module.

    One that is wrapped already is left alone; one with weights (an IP-Adapter's), which belongs to the model; and one
    that somebody else wrote: diffusers hands a processor the keyword arguments that its own signature names.
    """
    for module in transformer.modules():
        if not isinstance(module, attention_class):
            continue
        if _of_diffusers(module.processor) and not isinstance(module.processor, nn.Module):
            module.processor = processor_class(module.processor)


def detach(transformer: nn.Module, attention_class: type) -> None:
    """Put back what `attach` wrapped."""
    for module in transformer.modules():
        if isinstance(module, attention_class) and isinstance(module.processor, MixedProcessor):
            module.processor = module.processor.original

"""Attention processors for mixed sequences, which call specedit_kernels; without a context they are the stock ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from specedit_kernels import qk_norm_rope

from ...modules import modules_of
from .contexts import Context, Rotated
from .fused_rows import rotate


class MixedProcessor:
    """Joint attention of text and image as a context says; without one, the processor that it replaced.

    A model family sets `stock`, the class of its stock processor, and has a `__call__` with the arguments of that one.
    named: their names.

    Test isinstance(rows, slice), not `is None`: Dynamo would specialise on the bounds and recompile for every edit.
    """

    stock: type
    named: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.isfunction(call := vars(cls).get("__call__")):
            cls.named = frozenset(inspect.signature(call).parameters) - {"self", "attn"}

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

    def joint(
        self,
        attn: nn.Module,
        head_dim: int,
        image: Tensor,
        text: Tensor | None,
        context: Context,
        rows: slice | None = None,
        owner: Any = None,
    ):
        """Attention of both streams, as the stock processor returns it; with `rows`, the output of these image rows."""
        each = streams(attn, head_dim, image, text, rows)
        out = self.attended(attn, each, context, rows, owner).to(image.dtype)
        if text is None:
            return out
        if isinstance(rows, slice):
            return image_output(attn, out)
        return self.projected(attn, *context.split(out, text.shape[1]))

    def attended(
        self, attn: nn.Module, streams: list[Stream], context: Context, rows: slice | None, owner: Any = None
    ) -> Tensor:
        """Attention output (b, n, H * D) of all rows of the streams, or of `rows` of the image's.

        owner: what kept keys and values belong to, by default the attention module.
        """
        some = isinstance(rows, slice)
        scales, v = _some_queries(streams, context, rows) if some else _all_queries(streams, context)
        scales, v = context.with_kept(attn if owner is None else owner, scales, v)
        out = context.attend(scales, v, context.output_rows if some else None, self)
        return out.flatten(2, 3)

    @staticmethod
    def projected(attn: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams' output, by the modules that the stock processor calls, in its order."""
        image = image_output(attn, image)
        return image, attn.to_add_out(text.contiguous()) if text.shape[1] else text


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces that of an attention module's class, which parses the processor's signature in every call.

    A method and not an object: of objects, compiled blocks would make graphs anew.
    """
    processor = self.processor
    if args or not isinstance(processor, MixedProcessor) or not processor.named.issuperset(kwargs):
        return type(self).forward(self, *args, **kwargs)  # which leaves out what the processor does not name
    return processor(self, **kwargs)


def runs_stock(context: Context | None, rows: slice | None) -> bool:
    """Whether an attention call is the stock processor's; one for some `rows` alone never is."""
    return context is None or (context.is_stock and not isinstance(rows, slice))


class FluxMixedProcessor(MixedProcessor):
    """FLUX's double and single blocks."""

    stock = FluxAttnProcessor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: Context | None = None,
        rows: slice | None = None,
    ):
        if runs_stock(specedit, rows):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.joint(attn, attn.head_dim, hidden_states, encoder_hidden_states, specedit, rows)


class QwenMixedProcessor(MixedProcessor):
    """Qwen-Image's double-stream blocks."""

    stock = QwenDoubleStreamAttnProcessor2_0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit: Context | None = None,
        rows: slice | None = None,
    ):
        if runs_stock(specedit, rows):
            return self.original(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        head_dim = attn.inner_dim // attn.heads
        return self.joint(attn, head_dim, hidden_states, encoder_hidden_states, specedit, rows)


def _norm_rope_scatter(q, k, v, norm_q, norm_k, cos, sin, out, rows: Tensor, backend: str | None) -> None:
    """Norm and rotate q and k, and write them (and v) into `rows` of the joint sequence."""
    if _weight_is_resident(norm_q, q) and _weight_is_resident(norm_k, k):
        weights = (norm_q.weight, norm_k.weight)
        qk_norm_rope(q, k, *weights, cos, sin, eps=norm_q.eps, v=v, out_index=rows, out=out, backend=backend)
        return
    for x, norm, target in ((q, norm_q, out[0]), (k, norm_k, out[1])):
        target[:, rows] = rotate(norm(x), cos, sin).to(target.dtype)
    if v is not None:
        out[2][:, rows] = v


class Stream(NamedTuple):
    """Rows `start` to `stop` of the joint sequence: projected (b, n, H, D), and the norms of queries and keys."""

    start: int
    stop: int
    q: Tensor | None
    k: Tensor
    v: Tensor
    norm_q: nn.Module
    norm_k: nn.Module


def streams(attn: nn.Module, head_dim: int, image: Tensor, text: Tensor | None, rows: slice | None) -> list[Stream]:
    """Image and text, projected; with `rows`, queries of these image rows and none of the text's.

    Modules are called in the order of the stock processors, since leaf-level offloading prefetches in the order of the
    first call. A call for the target's tokens alone has no text.
    """
    length = 0 if text is None else text.shape[1]
    queries = rows if isinstance(rows, slice) else slice(None)
    names = ("to_q", "to_k", "to_v", "to_qkv")
    each = _projected(attn, names, head_dim, image, queries)
    streams = [Stream(length, length + image.shape[1], *each, attn.norm_q, attn.norm_k)]
    if length:
        names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv")
        each = _projected(attn, names, head_dim, text, None if isinstance(rows, slice) else slice(None))
        streams.append(Stream(0, length, *each, attn.norm_added_q, attn.norm_added_k))
    return streams


def _projected(
    attn: nn.Module, names: tuple[str, ...], head_dim: int, states: Tensor, rows: slice | None
) -> list[Tensor | None]:
    """Queries (of some rows, or None of none), keys and values of states (b, n, C), by heads."""
    *each, fused = names
    if getattr(attn, "fused_projections", False):  # one product gives all three, for all rows
        q, k, v = getattr(attn, fused)(states).chunk(3, dim=-1)
        q = q[:, rows] if isinstance(rows, slice) else None
    else:
        to_q, to_k, to_v = (getattr(attn, name) for name in each)
        q = to_q(states[:, rows]) if isinstance(rows, slice) else None
        k, v = to_k(states), to_v(states)
    return [x if x is None else by_heads(x, head_dim) for x in (q, k, v)]


def by_heads(x: Tensor, head_dim: int) -> Tensor:
    """(b, n, H * D) as (b, n, H, D)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def _all_queries(streams: list[Stream], context: Context) -> tuple[list[Rotated], Tensor]:
    """Queries and keys of all rows at every scale, and values: normed, rotated and placed in one pass a stream."""
    if len(streams) == 1 and context.in_order:
        return _in_order(streams[0], context)
    batch, _, *heads = streams[0].k.shape
    v = streams[0].v.new_empty((batch, sum(stream.k.shape[1] for stream in streams), *heads))
    scales = [Rotated(torch.empty_like(v), torch.empty_like(v)) for _ in context.scales]
    image = streams[0]
    places = context.places(image.start, image.stop - image.start)
    for stream, rows in zip(streams, places, strict=False):
        for i, ((cos, sin), (q, k)) in enumerate(zip(context.scales, scales, strict=True)):
            tables = cos[..., stream.start : stream.stop, :], sin[..., stream.start : stream.stop, :]
            out, values = ([q, k, v], stream.v) if i == 0 else ([q, k], None)
            norms = stream.norm_q, stream.norm_k
            _norm_rope_scatter(stream.q, stream.k, values, *norms, *tables, out, rows, context.kernels)
    return scales, v


def _in_order(stream: Stream, context: Context) -> tuple[list[Rotated], Tensor]:
    """The same of a stream that lists all rows as the joint sequence does, so that nothing has to be placed."""
    scales, v = [], stream.v
    for cos, sin in context.scales:
        tables = cos[..., stream.start : stream.stop, :], sin[..., stream.start : stream.stop, :]
        # A part of a wider projection is copied along: a cache would keep all of that.
        values = None if v.is_contiguous() else v
        q, k, *copied = _norm_and_rotate_pair(stream, *tables, values, context.kernels)
        scales.append(Rotated(q, k))
        v = copied[0] if copied else v
    return scales, v


def _some_queries(streams: list[Stream], context: Context, rows: slice) -> tuple[list[Rotated], Tensor]:
    """Queries of some image rows at every scale; keys and values of all rows."""
    image, scales = streams[0], []
    own = slice(image.start + rows.start, image.start + rows.stop)
    for cos, sin in context.scales:
        q = _norm_and_rotate(image.q, image.norm_q, cos[..., own, :], sin[..., own, :], context.kernels)
        keys = []
        for stream in streams:
            here = slice(stream.start, stream.stop)
            tables = cos[..., here, :], sin[..., here, :]
            keys.append(_norm_and_rotate(stream.k, stream.norm_k, *tables, context.kernels))
        scales.append(Rotated(q, context.join(*keys)))
    return scales, context.join(*(stream.v for stream in streams))


def image_output(attn: nn.Module, image: Tensor) -> Tensor:
    image = attn.to_out[0](image.contiguous())
    return attn.to_out[1](image) if len(attn.to_out) > 1 else image  # dropout


def _norm_and_rotate_pair(
    stream: Stream, cos: Tensor, sin: Tensor, v: Tensor | None, backend: str | None
) -> tuple[Tensor, ...]:
    """Normed and rotated queries and keys of a stream, and a copy of v where it is given."""
    q, k, norm_q, norm_k = stream.q, stream.k, stream.norm_q, stream.norm_k
    if _weight_is_resident(norm_q, q) and _weight_is_resident(norm_k, k):
        return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps, v=v, backend=backend)
    pair = rotate(norm_q(q), cos, sin).to(q.dtype), rotate(norm_k(k), cos, sin).to(k.dtype)
    return pair if v is None else (*pair, v.contiguous())


def _norm_and_rotate(x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, backend: str | None) -> Tensor:
    """Normed and rotated x (b, n, H, D). The kernel takes a pair; its second result is dropped."""
    if _weight_is_resident(norm, x):
        weight = norm.weight
        return qk_norm_rope(x, x, weight, weight, cos, sin, eps=norm.eps, backend=backend)[0]
    return rotate(norm(x), cos, sin)


def _weight_is_resident(norm: nn.Module, x: Tensor) -> bool:
    """Whether the weights of `norm` are on x's device. A hooked norm has to be called: its hook brings the weights, or
    waits for a copy that diffusers' streams have begun."""
    own = vars(norm)  # without the search for a submodule's name
    return "_diffusers_hook" not in own and "_hf_hook" not in own and norm.weight.device == x.device


def half_table(table: Tensor) -> Tensor:
    """diffusers lists every angle twice (S, D); the kernel takes it once (S, D/2), float32."""
    return table[:, ::2].float().contiguous()


def processors_of(transformer: nn.Module, attention_class: type | tuple[type, ...]) -> list[Any]:
    """The processors of a transformer's attention modules."""
    return [module.processor for module in modules_of(transformer) if isinstance(module, attention_class)]


def why_unsupported_processor(
    transformer: nn.Module, attention_class: type | tuple[type, ...], backend: str | None
) -> str | None:
    """Why a transformer runs stock: another engine without processors, or processors that are not diffusers' own.

    backend: `attention` of the configuration; None for families whose attention="stock" runs our processors too.
    """
    processors = processors_of(transformer, attention_class)
    if not processors:
        return f"the attention of {type(transformer).__name__} takes no processors of ours"
    for processor in processors:
        own = processor.original if isinstance(processor, MixedProcessor) else processor
        if backend != "stock" and not _of_diffusers(own):
            name = type(own).__name__
            hint = "" if backend is None else ', which attention="stock" would run'
            return f"its attention processor {name} is none of diffusers' own{hint}"
        if backend is None and isinstance(own, nn.Module):
            return "an attention processor with weights is loaded, and SpecEdit cannot stand in for it"
    return None


def _of_diffusers(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "diffusers"


def attach(
    transformer: nn.Module, attention_class: type | tuple[type, ...], wrap: Callable[[Any], MixedProcessor]
) -> None:
    """Wrap the processor of every attention module. wrap: the processor's class, or what chooses one for a processor.

    Left alone are wrapped ones, those with weights (an IP-Adapter's), and those of other libraries, because diffusers
    passes a processor the keyword arguments in its own signature.
    """
    for module in modules_of(transformer):
        if not isinstance(module, attention_class):
            continue
        if _of_diffusers(module.processor) and not isinstance(module.processor, nn.Module):
            module.processor = wrap(module.processor)
        if _of_diffusers(module) and "forward" not in vars(module):
            module.forward = MethodType(forward, module)


def detach(transformer: nn.Module, attention_class: type | tuple[type, ...]) -> None:
    """Put back what `attach` wrapped."""
    for module in modules_of(transformer):
        if not isinstance(module, attention_class):
            continue
        if isinstance(module.processor, MixedProcessor):
            module.processor = module.processor.original
        if getattr(vars(module).get("forward"), "__func__", None) is forward:
            del module.forward

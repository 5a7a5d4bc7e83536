"""Compiled blocks: arguments made alike, so that few graphs serve every size, batch and mask.

Dynamo keeps at most `recompile_limit` graphs of a block's code, and fails beyond it under `fullgraph=True`. It
recompiles for views, for other strides, and for arguments that only some calls have. A wrapper around the compiled call
removes these differences without changing a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .contexts import Stock
from .sequences import mark_dynamic

STREAMS = ("hidden_states", "encoder_hidden_states")


class CompiledBlock:
    """Replaces the compiled call of a block.

    take: arguments to the context among them, or None. drop: arguments to those of a stock call; None for the last
    block, which needs the context of a stock call too.
    """

    def __init__(self, compiled: Callable, take: Callable, drop: Callable | None):
        self.compiled, self.take, self.drop = compiled, take, drop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self.take(kwargs)
        kwargs |= {name: unviewed(kwargs[name]) for name in STREAMS if kwargs.get(name) is not None}
        if isinstance(context, Stock):
            kwargs = kwargs if self.drop is None else self.drop(kwargs)  # the graph is a stock call's
        elif context is not None:
            for name in STREAMS:
                mark_dynamic(kwargs.get(name), 2)
            for table in kwargs.get("image_rotary_emb") or ():
                mark_dynamic(table, 1)
            kwargs |= context.for_graph(kwargs)
        return self.compiled(*args, **kwargs)


def unviewed(states: Tensor) -> Tensor:
    """The same values with the strides of a new tensor; not a view, since Dynamo guards a view's base."""
    states = states.contiguous()
    return torch.ops.aten._unsafe_view(states, states.shape)


def attach(transformer: nn.Module, take: Callable, drop: Callable, last: nn.Module | None) -> None:
    """Wrap the compiled calls of a transformer's blocks; idempotent. `last`: the block that is trimmed, or None."""
    for block in blocks(transformer):
        compiled = getattr(block, "_compiled_call_impl", None)
        if compiled is not None and not isinstance(compiled, CompiledBlock):
            block._compiled_call_impl = CompiledBlock(compiled, take, None if block is last else drop)


def detach(transformer: nn.Module) -> None:
    """Put the compiled calls back."""
    for block in blocks(transformer):
        if isinstance(wrapper := getattr(block, "_compiled_call_impl", None), CompiledBlock):
            block._compiled_call_impl = wrapper.compiled


def is_whole(transformer: nn.Module) -> bool:
    """Whether a transformer is compiled as a whole, not block by block."""
    return hasattr(transformer, "_orig_mod") or getattr(transformer, "_compiled_call_impl", None) is not None


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer; empty for another engine's."""
    lists = (getattr(transformer, name, ()) for name in ("transformer_blocks", "single_transformer_blocks"))
    return [block for each in lists for block in each]


def take_keyword(kwargs: dict[str, Any]) -> Any:
    """The context among `joint_attention_kwargs`."""
    return (kwargs.get("joint_attention_kwargs") or {}).get("specedit")


def drop_keyword(kwargs: dict[str, Any], nothing: dict | None) -> dict[str, Any]:
    """The arguments without the context; `nothing`: a stock call's value of empty `joint_attention_kwargs`."""
    rest = {name: value for name, value in kwargs["joint_attention_kwargs"].items() if name != "specedit"}
    return kwargs | {"joint_attention_kwargs": rest or nothing}

"""How a context reaches LongCat's attention, whose transformer takes no arguments for it.

The transformer joins `txt_ids` and `img_ids`, has `pos_embed` make rotary tables of them, and hands these to every
block. The context travels that way: inside the ids, then as a third entry behind cos and sin. Nothing is kept anywhere,
so threads may share a transformer, and a stock call runs nothing that a compiler cannot trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.contexts import Context
from ..attention.sequences import Movable
from ..shared.position_hook import PositionHook


@dataclass(eq=False)  # not frozen: Dynamo would rebuild it from proxies, which have no values to read
class PlacedIds(Movable):
    """`img_ids` (N, 3) of a call with a context. `torch.cat` with other ids gives all ids and the same context."""

    ids: Tensor
    context: Context

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not torch.cat:
            return NotImplemented
        parts, *rest = args
        context = next(part.context for part in parts if isinstance(part, PlacedIds))
        ids = [part.ids if isinstance(part, PlacedIds) else part for part in parts]
        return PlacedIds(torch.cat(ids, *rest, **(kwargs or {})), context)


class ContextHook(PositionHook):
    """The tables of the ids, and the context where they carry one."""

    def __call__(self, ids: Tensor | PlacedIds) -> tuple:
        if isinstance(ids, PlacedIds):
            return (*self.stock(ids.ids), ids.context)
        return self.stock(ids)


def split(rotary: tuple | None) -> tuple[tuple[Tensor, Tensor] | None, Context | None]:
    """The tables that a block was given, and the context or None."""
    if rotary is None or len(rotary) == 2:
        return rotary, None
    cos, sin, context = rotary
    return (cos, sin), context


def take(kwargs: dict[str, Any]) -> Context | None:
    """The context among a block's arguments."""
    return split(kwargs.get("image_rotary_emb"))[1]


def drop(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments without the context."""
    return kwargs | {"image_rotary_emb": split(kwargs["image_rotary_emb"])[0]}

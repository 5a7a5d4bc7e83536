"""Position ids that know their rotary tables: FLUX.1's transformer would make them of the same ids in every step.

The hook on `transformer.pos_embed` hands the tables back; any other call goes to the stock one. Nothing is kept
anywhere, so threads may share a transformer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.contexts import Tables
from .position_hook import PositionHook


class PlacedIds(Tensor):
    """Ids (N, 3) of target and reference, or (S, 3) with the text's before them.

    tables: cos and sin (S, D) of all. What is computed with such ids is a plain tensor, but for the text's joined to
    them.
    """

    tables: Tables

    @classmethod
    def of(cls, ids: Tensor, tables: Tables) -> Tensor:
        """The ids with their tables; a subclass of Tensor stays as it is."""
        if type(ids) is not Tensor:
            return ids
        placed = ids.as_subclass(cls)
        placed.tables = tables
        return placed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is torch.cat and isinstance(last := args[0][-1], cls) and len(result) == len(last.tables[0]):
            return cls.of(result, last.tables)
        return result


class TablesHook(PositionHook):
    """The tables that a call's ids bring with them; those of any other ids are made."""

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.tables if isinstance(ids, PlacedIds) else self.stock(ids)

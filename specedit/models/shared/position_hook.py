"""A hook in place of a transformer's `pos_embed.forward`, for positions that the model has no tables for."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class PositionHook:
    """Replaces `pos_embed.forward`. It keeps no state: what a call needs comes with the call."""

    def __init__(self, stock: Callable):
        self.stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def attach(pos_embed: nn.Module, hook: type[PositionHook]) -> None:
    """Put the hook in place; idempotent."""
    if not isinstance(vars(pos_embed).get("forward"), PositionHook):
        pos_embed.forward = hook(pos_embed.forward)


def detach(pos_embed: nn.Module) -> None:
    """Take the hook out again."""
    hook = vars(pos_embed).get("forward")
    if not isinstance(hook, PositionHook):
        return
    if hook.stock == MethodType(type(pos_embed).forward, pos_embed):
        del pos_embed.forward
    else:
        pos_embed.forward = hook.stock  # another library's own replacement, from before us

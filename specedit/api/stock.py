"""Why a pipeline or a call runs the stock path."""

from __future__ import annotations

from typing import Any

import torch

from ..method.adapter import Adapter
from ..modules import modules_of
from ..once import warn_caller
from . import accelerated
from .installation import Installation


def why_stock(pipe: Any, adapter: Adapter) -> str | None:
    """Why calls of a pipeline cannot be accelerated as it is at the moment (one phrase), or None."""
    return adapter.schedule_refusal(pipe) or _conflicting_feature(pipe)


def why_stock_call(pipe: Any, installation: Installation, call: dict[str, Any]) -> str | None:
    """Why this call cannot be accelerated (one phrase), or None."""
    adapter, config = installation.adapter, installation.config
    reason = why_stock(pipe, adapter) or _overridden_call(installation.stock_class, adapter)
    reason = reason or adapter.refusal(pipe, call, config.attention)
    if reason is None and (method := config.method_options) is not None and (strength := adapter.strength(call)) != 1:
        return f"strength={strength} starts from the picture, and method={method.name!r} from noise"
    return reason


def warn_of_stock(installation: Installation, reason: str, edit_mask: Any) -> None:
    """Say that a call runs stock: once for each reason, and always where a mask is lost."""
    # The stock path ignores edit_mask and keep_pixels, so warn on every call.
    lost = ["edit_mask"] * (edit_mask is not None) + ["keep_pixels"] * installation.config.keep_pixels
    if not lost and reason in installation.warned:
        return
    installation.warned.add(reason)
    more = f"; {' and '.join(lost)} not applied, so any pixel may change" if lost else ""
    warn_caller(f"SpecEdit runs the stock pipeline: {reason}{more}")


def _conflicting_feature(pipe: Any) -> str | None:
    if getattr(pipe.transformer, "is_cache_enabled", False) or any(map(_caches, modules_of(pipe.transformer))):
        return "a diffusers cache is enabled on the transformer, and it would mix up the stages"
    # cache-dit, and the caches that it descends from, mark what they patch. Their blocks need a context that only the
    # stock call opens.
    if getattr(pipe.transformer, "_is_cached", False) or any("cache_dit" in c.__module__ for c in type(pipe).__mro__):
        return "cache-dit is enabled on this pipeline, and its cache would mix up the stages; disable it first"
    if getattr(getattr(pipe.transformer, "_parallel_config", None), "context_parallel_config", None) is not None:
        return "context parallelism splits the sequence over several devices, and SpecEdit's has coarse and fine tokens"
    return None


def _caches(module: torch.nn.Module) -> bool:
    """Whether a diffusers cache hangs on `module`: `apply_*_cache` puts it there without telling the transformer."""
    if (registry := vars(module).get("_diffusers_hook")) is None:
        return False
    names = [type(hook).__module__.rpartition(".")[-1] for hook in registry.hooks.values()]
    return any(name.endswith("cache") or name == "pyramid_attention_broadcast" for name in names)


def _overridden_call(stock: type, adapter: Adapter) -> str | None:
    """Why a class whose call is not the library's runs stock: what it adds or replaces would be left out."""
    own = [base for base in stock.__mro__ if "__call__" in vars(base) and not accelerated.is_ours(base)]
    # A library that undoes its patch of a class leaves there what the class had inherited.
    owner = [base for base in own if vars(base)["__call__"] is vars(own[0])["__call__"]][-1]
    if owner in adapter.calls or owner.__module__.partition(".")[0] in ("diffusers", __package__.partition(".")[0]):
        return None
    return f"{owner.__qualname__} has a __call__ of its own, and SpecEdit's loop would not run what it adds"

"""Whether the model's own attention backend takes a mask, which is how a bias per key reaches it.

Some of diffusers' backends raise an error for a mask, some take only boolean ones, and older versions ignore it. Each
is called once with meta tensors of four tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import nn

from ...config import SpecEditConfig
from ...modules import modules_of
from .processors import MixedProcessor

MAKES_BOOLEAN = ("_native_npu",)  # casts the mask to bool, so that a bias has no effect


def check(transformer: nn.Module, config: SpecEditConfig, coarse: bool = False) -> None:
    """ValueError where `attention="stock"` would pass a mask to a backend that takes none.

    coarse: whether a mask is needed wherever the target has fewer tokens, with a bias or without.
    """
    if config.attention != "stock":
        return
    if coarse and (sum(config.steps[:2]) or config.uses_draft):
        _check_backends(transformer, "attention='auto' brings its own kernels")
        return
    if config.key_bias == "none" or not config.is_mixed:
        return
    if config.method_options is not None and "key_bias" not in config.method_options.uses:
        return
    _check_backends(transformer, "key_bias='none' needs no mask, attention='auto' brings its own kernels")


def _check_backends(transformer: nn.Module, cure: str) -> None:
    for name in sorted(backends(transformer)):
        if not takes_mask(name):
            raise ValueError(
                f"attention: expected an attention backend that takes a mask with attention='stock', got {name!r}; "
                f"{cure}"
            )


def backends(transformer: nn.Module) -> set[str]:
    """Names of the attention backends that a transformer's wrapped processors run on."""
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    processors = (getattr(module, "processor", None) for module in modules_of(transformer))
    chosen = [p._attention_backend or active for p in processors if isinstance(p, MixedProcessor)]
    return {str(getattr(name, "value", name)) for name in chosen}


def takes_mask(name: str) -> bool:
    """Whether the backend called `name` takes an additive floating point mask (B, 1, 1, N_k)."""
    registry = attention_dispatch._AttentionBackendRegistry
    member = attention_dispatch.AttentionBackendName(name)
    if name in MAKES_BOOLEAN or "attn_mask" not in registry._supported_arg_names[member]:
        return False
    return not refuses_mask(registry._backends[member])


@cache
def refuses_mask(function: Callable[..., Any]) -> bool:
    """Whether a backend raises an error about the mask; any other error has another cause."""
    states = torch.empty(1, 4, 1, 64, device="meta", dtype=torch.bfloat16)
    mask = torch.empty(1, 1, 1, 4, device="meta", dtype=torch.bfloat16)
    try:
        function(query=states, key=states, value=states, attn_mask=mask)
    except (ValueError, TypeError, NotImplementedError) as error:
        return "mask" in str(error).lower()
    except Exception:
        return False
    return False

"""Triton kernels and their launches. Importing this package imports Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .attention import launch_attention
from .expand import launch_contract, launch_expand
from .launch import Config, check_device
from .norm_rope import launch_norm_rope
from .rows import launch_gather, launch_scatter
from .sums import launch_weighted_sum

_LAUNCHES: dict[str, Callable[..., Any]] = {
    "gather_tokens": launch_gather,
    "scatter_tokens": launch_scatter,
    "expand_tokens": launch_expand,
    "contract_tokens": launch_contract,
    "mixed_attention": launch_attention,
    "qk_norm_rope": launch_norm_rope,
    "weighted_sum": launch_weighted_sum,
}


def run(name: str, args: tuple[Any, ...], tuned: dict[str, Config] | None = None) -> Any:
    """Launches an operator's kernel on the device of its first tensor. `tuned` overrides launch parameters."""
    device = args[0].device
    check_device(device)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        return _LAUNCHES[name](*args, tuned=tuned)

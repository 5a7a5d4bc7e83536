"""Triton kernels and their launches. Importing this package imports Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .attention_launch import parameters, prepare_attention
from .attention_launch import pingpong_shapes as pingpong_shapes
from .attention_launch import split_shapes as split_shapes
from .attention_order import order
from .attention_plan import Schedule
from .expand import prepare_contract, prepare_expand
from .launch import Config, check_device
from .norm_rope import prepare_norm_rope
from .rows import prepare_gather, prepare_scatter
from .sums import prepare_weighted_sum

_PREPARE: dict[str, Callable[..., Callable[..., Any]]] = {
    "gather_tokens": prepare_gather,
    "scatter_tokens": prepare_scatter,
    "expand_tokens": prepare_expand,
    "contract_tokens": prepare_contract,
    "mixed_attention": prepare_attention,
    "qk_norm_rope": prepare_norm_rope,
    "weighted_sum": prepare_weighted_sum,
}


def prepare(
    name: str, args: tuple[Any, ...], tuned: dict[str, Config] | None = None, pingpong: bool = False
) -> Callable[..., Any]:
    """What runs an operator on arguments like these, alike in all but values and addresses of the same alignment.

    It launches on the device of the first tensor. The operators NAME and NAME_out, which writes into its last tensors,
    have the same one. `tuned` overrides launch parameters. With `pingpong`, attention may take that kernel where the
    parameters name it.
    """
    device = args[0].device
    check_device(device)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        operator = name.removesuffix("_out")
        more = {"pingpong": pingpong} if operator == "mixed_attention" else {}
        call = _PREPARE[operator](*args, tuned=tuned, **more)
    return _on(device, call) if elsewhere else call


def plan(
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    bias: torch.Tensor | None,
    queries: int,
    keys: int,
    longest: int | None,
    head_dim: int,
    dtype: torch.dtype,
    pingpong: bool = False,
) -> tuple[torch.Tensor | int | None, ...]:
    """The fields of an `AttentionPlan` from `query_tiles` on: for aligned tensors, which most are."""
    given = cu_k if cu_k is not None else bias
    assert given is not None  # `planning.plan` has looked
    device = given.device
    check_device(device)
    sequences = 1 if cu_k is None else cu_k.shape[0] - 1
    _, config = parameters(device, dtype.itemsize, head_dim, keys // sequences, True, None, pingpong)
    rows, columns = config["block_m"], config["block_n"]
    query_tiles: tuple[torch.Tensor | int | None, ...] = (None, 0)
    key_order: tuple[torch.Tensor | int | None, ...] = (None, None, None, 0)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if cu_q is not None and cu_k is not None and sequences > 1:
            query_tiles = Schedule(sequences, queries, keys, longest, rows)(cu_q, cu_k), rows
        if bias is not None:
            key_order = *order(bias, cu_k, columns), columns
    return *query_tiles, *key_order


def _on(device: torch.device, call: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any) -> Any:
        with torch.cuda.device(device):
            return call(*args)

    return guarded


def run(name: str, args: tuple[Any, ...], tuned: dict[str, Config] | None = None) -> Any:
    """Launches an operator's kernel on the device of its first tensor. `tuned` overrides launch parameters."""
    return prepare(name, args, tuned, pingpong=True)(*args)

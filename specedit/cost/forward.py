"""Floating-point operations of forward passes: one accounting, for runs and for plans.

One multiply-add counts as two operations. Decoder, text encoder and verification are left out, as in the paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..method.trace import ForwardCall
from .blocks import block_count, field


def flops_of(calls: Iterable[ForwardCall], model_config: Any) -> float:
    """Operations of forward calls, those that were made or those that would be.

    The order of the calls does not matter, nor how they are grouped, not even in the last digit.

    Args:
        model_config: as for `transformer_flops`.
    """
    counts: Counter[tuple[float, float | None, float | None, float, int]] = Counter()
    for call in calls:
        counts[call.tokens, call.keys, call.read, call.forecast, call.measured] += call.samples * call.count
    return math.fsum(
        count * (transformer_flops(model_config, tokens, keys, read) + forecast + _measuring(model_config, n, tokens))
        for (tokens, keys, read, forecast, n), count in counts.items()
    )


def _measuring(model_config: Any, queries: int, keys: float) -> float:
    """Operations of computing the logits of so many queries once more in every block: 2 d for each pair of tokens."""
    if not queries:
        return 0.0
    layers, d = _size(model_config)
    return float(layers * 2 * d * queries * keys)


def _size(model_config: Any) -> tuple[int, int]:
    """Blocks, and width."""
    layers = _field(model_config, "num_layers") + _field(model_config, "num_single_layers", 0)
    return layers, _field(model_config, "num_attention_heads") * _field(model_config, "attention_head_dim")


def _field(config: Any, name: str, default: int | None = None) -> int:
    value = field(config, name, default)
    if value is None:
        raise ValueError(f"model_config: expected a field {name!r}, got a {type(config).__name__} without it")
    return int(value)


def transformer_flops(model_config: Any, tokens: float, keys: float | None = None, read: float | None = None) -> float:
    """Operations of one forward pass over one sequence: tokens * (L*24*d^2 + L*4*d*tokens).

    Per token and block: the four attention projections (8 d^2) and the MLP of ratio 4 (16 d^2); a FLUX single block
    holds the same matrices fused (6 + 8 + 10 d^2). `register_block_count` has the counts of other blocks, such as
    FLUX.2's 26 d^2. Attention adds Q K^T and P V, each 2*d per pair of tokens.
    Modulation, norms, embeddings and the output projection are below 1 % and left out. FLUX at 8704 tokens
    (1024 x 1024, reference, 512 text): 165.4 T; the paper's Table 5 has 8299.54 / 50 = 166.0 T.

    Args:
        model_config: a diffusers transformer config, mapping or object: num_layers, num_attention_heads,
            attention_head_dim, and num_single_layers where the model has single blocks.
        tokens: length of the whole sequence (text + target + reference). A mean over samples may be fractional.
        keys: tokens attended to, where that is more than `tokens`, because keys and values of the others come from a
            cache, or less, as a mean over queries, because attention skips some.
        read: tokens whose output is read, where the last block computes no others: of the rest only keys and values
            (4 d^2, or what a block's fused matrices give). None: that block computes all of them.

    Raises:
        ValueError: a field is missing, or `tokens` is negative.
    """
    if not tokens >= 0:
        raise ValueError(f"tokens: expected a number of at least 0, got {tokens!r}")
    layers, d = _size(model_config)
    whole, unread, _ = block_count(model_config)
    keys = tokens if keys is None else keys
    if read is None:
        return float(tokens * (layers * whole * d * d + layers * 4 * d * keys))
    last = tokens * unread * d * d + read * ((whole - unread) * d * d + 4 * d * keys)
    return float(tokens * ((layers - 1) * whole * d * d + (layers - 1) * 4 * d * keys) + last)

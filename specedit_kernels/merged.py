"""Attention with few distinct biases, merged from unbiased passes of PyTorch's fused attention. Needs no Triton.

With the keys of bias b alone, a pass gives o_b and its log-sum-exp l_b. The attention over all keys is

    out = sum_b w_b o_b,  w = softmax_b(l_b + b),  lse = logsumexp_b(l_b + b)

which is exact for any biases; their number decides what it costs. Source: the merging of blocks in FlashAttention
(arXiv 2205.14135), algorithm 1.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from . import reference
from .key_groups import KeyGroups, offsets

Pass = tuple[torch.Tensor, torch.Tensor]  # out (..., N, H, D) and lse (..., H, N)
_ALIGNED = 8  # head dims of flash attention are multiples of this


def mixed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int | None, key_bias: torch.Tensor | None, scale: float | None,
    return_lse: bool, groups: KeyGroups | None = None,
) -> Pass:  # fmt: skip
    """The operator `mixed_attention` without lists of blocks; `groups` of `key_bias` are found unless given.

    Returns:
        out, shape and dtype of `q`, and its lse, float32 (float64 of float64), empty without `return_lse`.
    """
    if cu_seqlens_q is not None and cu_seqlens_q.shape[0] == 2:  # one packed sequence is a dense batch
        bias = None if key_bias is None else key_bias[None]
        dense = mixed_attention(q[None], k[None], v[None], None, None, None, bias, scale, return_lse, groups)
        return dense[0][0], dense[1][0] if return_lse else dense[1]
    if groups is None and key_bias is not None:
        groups = KeyGroups.of(key_bias, cu_seqlens_k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads, folds = q.shape[-2], q.shape[-2] // max(1, k.shape[-2])
    rows = reference.fold_heads(q, k.shape[-2])
    if cu_seqlens_q is None and (groups is None or not groups.ends):
        out, lse = _merge(_dense_passes(rows, k, v, scale, groups), rows)
    else:
        if cu_seqlens_q is None:
            cu_q, longest = offsets(rows.shape[0], rows.shape[1], rows.device), rows.shape[1]
        else:
            cu_q, longest = cu_seqlens_q * folds, (rows.shape[0] if max_seqlen_q is None else max_seqlen_q * folds)
        flat, k, v = (x if x.dim() == 3 else x.flatten(0, 1) for x in (rows, k, v))
        out, lse = _merge(_packed_passes(flat, k, v, cu_q, cu_seqlens_k, longest, scale, groups), flat)
        if rows.dim() == 4:
            out, lse = out.view_as(rows), lse.unflatten(1, rows.shape[:2]).transpose(0, 1)
    out = reference.unfold_heads(out, heads).contiguous()
    return out, reference.unfold_lse(lse, heads).contiguous() if return_lse else lse.new_empty(0)


def _merge(passes: list[Pass], q: torch.Tensor) -> Pass:
    """The attention over all keys, from that over the keys of each bias, whose lse has the bias already."""
    if len(passes) == 1:
        return passes[0]
    if not passes:  # every key is hidden
        return _nothing(q)
    each = torch.stack([lse for _, lse in passes])
    total = each.logsumexp(0)
    weights = (each - total.masked_fill(total == -torch.inf, 0)).exp().transpose(-1, -2).unsqueeze(-1)
    out = passes[0][0] * weights[0]  # in the precision of the lse
    for weight, (one, _) in zip(weights[1:], passes[1:]):
        out = torch.addcmul(out, one.to(out.dtype), weight)
    return out.to(q.dtype), total


def _nothing(q: torch.Tensor) -> Pass:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf, dtype=dtype, device=q.device)
    return torch.zeros_like(q), lse


def _dense_passes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, groups: KeyGroups | None
) -> list[Pass]:
    """q (B, N, H, D), k and v (B, K, H, D)."""
    if groups is None:
        return [_dense(q, k, v, scale)]
    passes = []
    for value, rows, _, _ in groups:
        # All of them are 0 to K - 1, in order.
        some = (k, v) if rows.shape[0] == k.shape[1] else (k.index_select(1, rows), v.index_select(1, rows))
        out, lse = _dense(q, *some, scale)
        passes.append((out, lse + value if value else lse))
    return passes


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Pass:
    """One unbiased pass by the fused attention that PyTorch itself would choose."""
    if q.numel() == 0 or k.shape[1] == 0:
        return _nothing(q)
    q_, k_, v_ = (_unit_stride(x).transpose(1, 2) for x in (q, k, v))
    chosen, aten = SDPBackend(torch._fused_sdp_choice(q_, k_, v_, scale=scale)), torch.ops.aten
    if on_cpu(q) and chosen == SDPBackend.FLASH_ATTENTION:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, scale=scale)
    elif chosen == SDPBackend.FLASH_ATTENTION:
        padded = [_padded(x) for x in (q_, k_, v_)]
        out, lse = aten._scaled_dot_product_flash_attention(*padded, scale=scale)[:2]
    elif chosen == SDPBackend.CUDNN_ATTENTION:
        out, lse = aten._scaled_dot_product_cudnn_attention(q_, k_, v_, None, True, scale=scale)[:2]
    elif chosen == SDPBackend.EFFICIENT_ATTENTION:
        out, lse = aten._scaled_dot_product_efficient_attention(q_, k_, v_, None, True, scale=scale)[:2]
    else:  # written out, as PyTorch would do
        return reference.attention_with_lse(q, k, v, None, scale)
    # The efficient kernel pads lse to 32 queries, and cuDNN's has a last axis of 1.
    lse = lse.reshape(*lse.shape[:2], -1)[..., : q.shape[1]]
    return out.transpose(1, 2)[..., : q.shape[-1]], lse


def _packed_passes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor | None, longest: int,
    scale: float, groups: KeyGroups | None,
) -> list[Pass]:  # fmt: skip
    """q (T, H, D), k and v (S, H, D) of all sequences, back to back."""
    if groups is None:
        assert cu_k is not None  # dense sequences are packed because their biases differ
        return [_packed(q, k, v, cu_q, cu_k, longest, scale, complete=False)]
    passes = []
    for value, rows, ends, complete in groups:
        assert ends is not None
        some = (k, v) if rows.shape[0] == k.shape[0] else (k[rows], v[rows])
        out, lse = _packed(q, *some, cu_q, ends, longest, scale, complete)
        passes.append((out, lse + value if value else lse))
    return passes


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, longest: int,
    scale: float, complete: bool,
) -> Pass:  # fmt: skip
    """One unbiased pass over packed sequences. complete: whether every sequence is known to have keys."""
    if q.numel() == 0 or k.shape[0] == 0:
        return _nothing(q)
    if not has_varlen(q):
        return _sequence_by_sequence(q, k, v, cu_q.tolist(), cu_k.tolist(), scale)
    padded = [_padded(_unit_stride(x)) for x in (q, k, v)]
    out, lse = torch.ops.aten._flash_attention_forward(
        *padded, cu_q.contiguous(), cu_k, longest, k.shape[0], 0.0, False, False, scale=scale
    )[:2]
    out = out[..., : q.shape[-1]]
    if not complete:  # flash attention gives +inf as the lse of no keys
        sequence = torch.bucketize(torch.arange(q.shape[0], device=q.device), cu_q[1:], right=True)
        empty = (cu_k[1:] == cu_k[:-1])[sequence.clamp_max(cu_k.shape[0] - 2)]
        out, lse = out.masked_fill(empty[:, None, None], 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def on_cpu(q: torch.Tensor) -> bool:
    """Whether PyTorch's operators for the CPU take these queries, rather than those for CUDA."""
    return q.device.type == "cpu"


def has_varlen(q: torch.Tensor) -> bool:
    """Whether PyTorch's flash attention for packed sequences takes these queries."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type != "cuda" or not half or q.shape[-1] > 256 or not torch.backends.cuda.flash_sdp_enabled():
        return False
    new_enough = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return new_enough and torch.backends.cuda.is_flash_attention_available()


def _sequence_by_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_ends: list[int], k_ends: list[int], scale: float
) -> Pass:
    parts = [
        _dense(q[None, a:b], k[None, c:d], v[None, c:d], scale)
        for (a, b), (c, d) in zip(itertools.pairwise(q_ends), itertools.pairwise(k_ends))
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Zeros up to a head dim that flash attention takes; they change no product."""
    missing = -x.shape[-1] % _ALIGNED
    return F.pad(x, (0, missing)) if missing else x

"""Peers from other packages; one that cannot run here says why."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch


def need(module: str, reason: str) -> None:
    """Skips a benchmark with a line that names what is missing."""
    if not torch.cuda.is_available():
        pytest.skip(f"{reason} needs a CUDA GPU")
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"{reason}: {module} is not installed")


def flash_attn_varlen(q, k, v, cu, bias, lengths):
    """FlashAttention-2 or -3, without a bias."""
    need("flash_attn.flash_attn_interface", "flash-attn's varlen")
    from flash_attn import flash_attn_varlen_func

    longest = max(map(sum, lengths))
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)


@functools.cache
def _key_bias_score_mod():
    """FlashAttention-4's score_mod that adds aux_tensors[0][key]; `key_global` counts over the packed batch."""
    import cutlass
    import cutlass.cute as cute

    registers = getattr(cute, "make_rmem_tensor", None) or cute.make_fragment

    @cute.jit
    def add_key_bias(scores, b_idx, h_idx, q_idx, key, aux_tensors, query_global, key_global):
        at = registers(1, cutlass.Int32)
        at.store(key_global)
        value = registers(1, cutlass.Float32)
        value[0] = aux_tensors[0][at[0]]
        return scores + value.load()

    return add_key_bias


def flash_attn_4(q, k, v, cu, bias, lengths):
    """FlashAttention-4 with the bias as a score_mod."""
    need("flash_attn.cute", "FlashAttention-4's score_mod")
    from flash_attn.cute import flash_attn_varlen_func

    longest = max(map(sum, lengths))
    result = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        score_mod=_key_bias_score_mod(), aux_tensors=[bias],
    )  # fmt: skip
    return result[0] if isinstance(result, tuple) else result


def flashinfer_norm_rope(q, k, weight, cos, sin):
    """FlashInfer's RMSNorm and rotary embedding, three launches.

    Its fused_qk_rmsnorm_rope computes the angles from a grid of positions, so it cannot take these.
    """
    need("flashinfer", "FlashInfer's rmsnorm and rope")
    from flashinfer.norm import rmsnorm
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    tokens, heads, dim = q.shape
    q, k = (rmsnorm(x.reshape(-1, dim), weight, eps=1e-6).view(tokens, heads * dim) for x in (q, k))
    positions = torch.arange(tokens, device=q.device)
    rotated = apply_rope_with_cos_sin_cache(positions, q, k, dim, torch.cat([cos, sin], dim=-1), is_neox=False)
    return torch.cat([x.view(tokens, heads, dim) for x in rotated])

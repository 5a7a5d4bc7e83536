"""The kernels in plain PyTorch: the tests' oracle, and the path for CPU tensors.

Half-precision inputs are computed in float32 (float64 inputs in float64) and rounded once on output. Attention is an
exception where no log-sum-exp is asked for: it is PyTorch's own, in the precision of the call. Nothing here
builds a queries-by-keys matrix for more than one block of queries, so memory stays linear in the sequence length
(unless a gradient keeps those blocks). Values are trusted here; `specedit_kernels.api` checks them.

Only the caller's `out` is written in place, so derivatives in both modes and `torch.func` pass through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import derivatives

# Explicit attention splits queries into blocks whose float32 logits stay below this many elements.
_LOGITS_PER_BLOCK = 1 << 24


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- tokens ----------------------------------------------------------------------------------------------------------


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`y[..., m, :] = x[..., index[m], :]`; see `specedit_kernels.gather_tokens`."""
    if x.dim() == 2:
        flat = x.index_select(0, index.reshape(-1))
        return flat.view(*index.shape, x.shape[-1])
    if index.dim() == 1:
        return x.index_select(1, index)
    return x.gather(1, index.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(src: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out[..., index[m], :] = src[..., m, :]` in place; see `specedit_kernels.scatter_tokens`."""
    if index.dim() == 1:
        return out.index_copy_(-2, index.long(), src)
    for b in range(out.shape[0]):  # autograd supports writes to out[b], but not to the views of an iteration
        out[b].index_copy_(0, index[b].long(), src[b])
    return out


# --- polynomials over stacked differences ----------------------------------------------------------------------------


def weighted_sum(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`y = sum_k weights[k] * stack[k]`; see `specedit_kernels.weighted_sum`."""
    compute = _compute_dtype(stack.dtype)
    y = weights[0].to(compute) * stack[0].to(compute)
    for weight, row in zip(weights[1:], stack[1:]):
        y = torch.addcmul(y, weight.to(compute), row.to(compute))
    return y.to(stack.dtype).contiguous()


# --- noise-exact resolution changes ----------------------------------------------------------------------------------


def fine_sigma(sigma: float) -> float:
    """Noise level after an expansion: `s' = 2s / (1 + s)`."""
    return 2 * sigma / (1 + sigma)


def coarse_sigma(sigma_fine: float) -> float:
    """Noise level after a contraction, the inverse of `fine_sigma`: `s = s' / (2 - s')`."""
    return sigma_fine / (2 - sigma_fine)


def noise_shape(coarse: torch.Tensor, patch: int) -> tuple[int, ...]:
    """Shape of the noise and detail that expand `coarse` (..., M, C): (..., M, 4, channels, 3) for packed 2x2 tokens,
    (..., M, C, 3) for unpacked ones."""
    *lead, width = coarse.shape
    return (*lead, width, 3) if patch == 1 else (*lead, 4, width // 4, 3)


def draw_noise(
    coarse: torch.Tensor,
    patch: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Standard normal noise to expand `coarse`. The axes before its last two are the batch.

    Samples are drawn one after the other, so a sample's numbers do not depend on how many others follow it; with a
    list of generators, one per sample, they do not depend on the others at all.
    """
    device, shape = coarse.device, noise_shape(coarse, patch)
    axes = coarse.dim() - 2
    batch = math.prod(shape[:axes])
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * batch
    noise = torch.empty((batch, *shape[axes:]), dtype=dtype, device=device)
    for sample, source in zip(noise, generators):
        if source is None or source.device.type == device.type:
            sample.normal_(generator=source)
        else:
            sample.copy_(torch.randn(sample.shape, generator=source, dtype=dtype, device=source.device))
    return noise.view(shape)


def draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, coarse: torch.Tensor) -> torch.Tensor:
    """Philox keys for in-kernel noise: int64, one per sample for a list of generators, otherwise one for all."""
    generators = [generator] if generator is None or isinstance(generator, torch.Generator) else generator
    device = coarse.device
    keys = [
        torch.randint(2**62, (1,), generator=g, device=device if g is None else g.device).to(device, non_blocking=True)
        for g in generators
    ]
    return keys[0] if len(keys) == 1 else torch.cat(keys)


def _multiply_high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product of two 32-bit unsigned numbers, held in int64 without overflow."""
    low = (b & 0xFFFF) * a
    middle = (b >> 16) * a + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011): four counters and two keys to four unsigned 32-bit words, in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(0xD2511F53, c0)
        high1, low1 = _multiply_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def philox_noise(seed: torch.Tensor, shape: Sequence[int], patch: int = 2) -> torch.Tensor:
    """The standard normal noise that the CUDA kernel draws, float32 of `shape`, which is that of `noise_shape`.

    Philox with the 64-bit key of the sample and counter (pixel, token, 0, 0), where pixel = child * channels + channel,
    and the channel alone for `patch` 1. One call gives four uniforms, from which Box-Muller makes the three normals of
    a pixel. With one key for the whole batch, tokens are numbered through all samples.
    """
    *lead, tokens = shape[: -2 if patch == 1 else -3]
    pixels = math.prod(shape[len(lead) + 1 : -1])
    rows = math.prod(lead) * tokens
    token = torch.arange(rows, device=seed.device)
    if seed.numel() == 1:
        key = seed.expand(rows)
    else:
        token = token % tokens
        key = seed.repeat_interleave(tokens)
    pixel = torch.arange(pixels, device=seed.device)
    zero = torch.zeros_like(pixel)
    halves = key[:, None] & 0xFFFFFFFF, (key[:, None] >> 32) & 0xFFFFFFFF
    words = philox_4x32((pixel.expand(rows, -1), token[:, None], zero, zero), halves)
    # As Triton does: a word read as a signed number x gives the uniform |x| / 2^31, kept off 0 for the logarithm.
    signed = (torch.where(w >= 2**31, w - 2**32, w) for w in words)
    u0, u1, u2, u3 = (torch.where(x < 0, -x - 1, x).float() * 4.6566127342e-10 for x in signed)
    radius, other_radius = (torch.sqrt(-2 * torch.log(u.clamp_min(1e-7))) for u in (u0, u2))
    turn = 2 * math.pi
    normals = [radius * torch.cos(turn * u1), radius * torch.sin(turn * u1), other_radius * torch.cos(turn * u3)]
    return torch.stack(normals, dim=-1).view(*shape)


def expand_tokens(
    coarse: torch.Tensor,
    sigma: float,
    *,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    detail: torch.Tensor | None = None,
    patch: int = 2,
) -> tuple[torch.Tensor, float]:
    """Splits every coarse token into its four children; see `specedit_kernels.expand_tokens`."""
    dtype = _compute_dtype(coarse.dtype)
    sigma_fine = fine_sigma(sigma)
    if noise is None:
        noise = draw_noise(coarse, patch, generator, dtype=dtype)
    d = noise.to(dtype) * sigma_fine
    if detail is not None:
        d = d + (1 - sigma_fine) * detail.to(dtype)
    z = coarse.to(dtype)
    if patch == 2:  # channels are slowest and the pixel becomes the child: (..., channels, 4) -> (..., 4, channels)
        z = z.unflatten(-1, (-1, 4)).transpose(-1, -2)
    c0 = z * (2 / (1 + sigma))
    d1, d2, d3 = d.unbind(-1)
    plus, minus = c0 + d1, c0 - d1
    total, difference = d2 + d3, d2 - d3
    pixels = (plus + total, minus + difference, plus - total, minus - difference)
    rounded = [(pixel / 2).to(coarse.dtype) for pixel in pixels]
    if patch == 1:
        return torch.stack(rounded, dim=-2), sigma_fine  # (..., M, 4, C)
    return torch.stack(rounded, dim=-1).flatten(-2), sigma_fine  # (..., M, 4, channels, 4) before


def contract_tokens(fine: torch.Tensor, sigma_fine: float, *, patch: int = 2) -> tuple[torch.Tensor, float]:
    """Merges four children into their coarse token; see `specedit_kernels.contract_tokens`."""
    sigma = coarse_sigma(sigma_fine)
    f = fine.to(_compute_dtype(fine.dtype))
    if patch == 1:
        mean = f.mean(-2)
    else:  # (..., M, 4, channels) -> (..., M, channels, 4)
        mean = f.unflatten(-1, (-1, 4)).mean(-1).transpose(-1, -2).flatten(-2)
    coarse = mean * (1 + sigma)
    return coarse.to(fine.dtype), sigma


# --- attention -------------------------------------------------------------------------------------------------------


def _detached_peak(logits: torch.Tensor) -> torch.Tensor:
    if logits.shape[-1] == 0:
        return logits.new_full((*logits.shape[:-1], 1), -math.inf)
    return logits.detach().amax(dim=-1, keepdim=True)


def _attend_rows(
    q: torch.Tensor, kt: torch.Tensor, vt: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Explicit softmax attention.

    q (B, n, H, D), kt (B, H, D, K), vt (B, H, K, D), bias (B, 1, 1, K) or None -> out (B, n, H, D), lse (B, H, n).
    """
    logits = (q.to(kt.dtype).transpose(1, 2) * scale) @ kt
    if bias is not None:
        logits = logits + bias
    # The peak cancels, so it needs no derivative. A row without keys subtracts 0, because exp(-inf - -inf) would be
    # NaN, and keeps weights of exp(-inf) = 0.
    peak = _detached_peak(logits)
    weights = (logits - peak.masked_fill(peak == -math.inf, 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    hidden = total == 0
    total = total.masked_fill(hidden, 1)
    out = (weights @ vt) / total
    lse = (peak + total.log()).masked_fill(hidden, -math.inf)
    return out.transpose(1, 2).to(q.dtype), lse.squeeze(-1)


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over blocks of queries.

    q (B, N, H, D), k and v (B, K, H, D), key_bias (B, K) or None -> out (B, N, H, D), lse (B, H, N).
    """
    dtype = _compute_dtype(q.dtype)
    logits_per_row = max(1, q.shape[0] * q.shape[2] * k.shape[1])
    kt = k.to(dtype).permute(0, 2, 3, 1)  # (B, H, D, K)
    vt = v.to(dtype).transpose(1, 2)  # (B, H, K, D)
    bias = None if key_bias is None else key_bias.to(dtype)[:, None, None, :]
    block = max(1, _LOGITS_PER_BLOCK // logits_per_row)
    parts = [_attend_rows(rows, kt, vt, bias, scale) for rows in q.split(block, dim=1)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)


def _needs_written_out(k: torch.Tensor) -> bool:
    """Whether PyTorch's fused attention is unusable: no keys, or missing derivatives."""
    return k.shape[1] == 0 or derivatives.forward_mode_possible()


def fold_heads(q: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Queries (..., N, H, D) that share a key head as more rows of it (..., N * H // H_kv, H_kv, D).

    So keys and values of grouped-query attention are not repeated.
    """
    groups = q.shape[-2] // max(1, key_heads)
    return q if groups <= 1 else q.unflatten(-2, (-1, groups)).transpose(-3, -2).flatten(-4, -3)


def unfold_heads(out: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `fold_heads` of an output (..., N * groups, H_kv, D) -> (..., N, H, D)."""
    groups = heads // max(1, out.shape[-2])
    return out if groups <= 1 else out.unflatten(-3, (-1, groups)).transpose(-3, -2).flatten(-3, -2)


def unfold_lse(lse: torch.Tensor, heads: int) -> torch.Tensor:
    """Likewise of a log-sum-exp (..., H_kv, N * groups) -> (..., H, N)."""
    groups = heads // max(1, lse.shape[-2])
    return lse if groups <= 1 else lse.unflatten(-1, (-1, groups)).transpose(-1, -2).flatten(-3, -2)


def zero_where_all_is_hidden(key_bias: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The output with 0 for samples that hide every key, of which some of PyTorch's fused kernels make NaN."""
    seen = (key_bias > -math.inf).any(-1)
    return torch.where(seen[:, None, None, None], out, 0)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention; q (B, N, H, D), k and v (B, K, H_kv, D), key_bias (B, K) or None."""
    heads = q.shape[2]
    q = fold_heads(q, k.shape[2])
    lse: torch.Tensor | None
    if return_lse or _needs_written_out(k):
        out, lse = attention_with_lse(q, k, v, key_bias, scale)
    else:
        # On a CPU a float32 mask fits all queries and costs nothing; elsewhere it has the precision of the call.
        on_cpu = q.device.type == "cpu"
        dtype = _compute_dtype(q.dtype) if on_cpu else q.dtype
        mask = None if key_bias is None else key_bias.to(dtype)[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
        out, lse = attended.transpose(1, 2).to(q.dtype), None  # autocast would make it another
        if key_bias is not None and not on_cpu:
            out = zero_where_all_is_hidden(key_bias, out)
    out, lse = unfold_heads(out, heads), None if lse is None else unfold_lse(lse, heads)
    return out.contiguous(), lse if lse is None else lse.contiguous()


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Non-causal attention with a per-key bias, packed or dense; see `specedit_kernels.mixed_attention`.

    `max_seqlen_q` only bounds a launch grid, which plain PyTorch does not have.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _attention(q, k, v, key_bias, scale, return_lse)
        return out if lse is None or not return_lse else (out, lse)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(q_ends) == 2:
        bias = None if key_bias is None else key_bias[None]
        out, lse = _attention(q[None], k[None], v[None], bias, scale, return_lse)
        return out[0] if lse is None or not return_lse else (out[0], lse[0])
    parts = []
    for i in range(len(q_ends) - 1):
        rows, cols = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        bias = None if key_bias is None else key_bias[None, cols]
        parts.append(_attention(q[None, rows], k[None, cols], v[None, cols], bias, scale, return_lse))
    out = torch.cat([part[0] for part, _ in parts])
    if not return_lse:
        return out
    return out, torch.cat([lse[0] for _, lse in parts if lse is not None], dim=1)


# --- query and key preparation ---------------------------------------------------------------------------------------


def _norm_rope(x: torch.Tensor, weight: torch.Tensor, angles: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis, then rotation of interleaved pairs; x (..., H, D), angles (..., 1, D/2) complex."""
    y = x.to(_compute_dtype(x.dtype))
    if eps < torch.finfo(y.dtype).tiny:
        # Without eps, squares of tiny values underflow. Scaling the largest value to 1 leaves the norm unchanged.
        peak = y.detach().abs().amax(dim=-1, keepdim=True)
        peak = peak.masked_fill((peak == 0) | peak.isinf(), 1)
        y = y / peak
        floor = torch.full_like(peak, eps) / peak / peak
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + floor) * weight.to(y.dtype)
    else:
        y = F.rms_norm(y, (y.shape[-1],), weight.to(y.dtype), eps)
    # An interleaved pair is a complex number, and its rotation a product.
    pairs = torch.view_as_complex(y.view(*y.shape[:-1], y.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    v: torch.Tensor | None = None,
    out_index: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm and rotary embedding of queries and keys; see `specedit_kernels.qk_norm_rope`."""
    dtype = _compute_dtype(q.dtype)
    angles = torch.complex(cos.to(dtype), sin.to(dtype)).unsqueeze(-2)
    first = _norm_rope(q, q_weight, angles, eps)
    if k is q and k_weight is q_weight:
        second = first.clone()
    else:
        second = _norm_rope(k, k_weight, angles, eps)
    rows = [first, second]
    if v is not None:
        rows.append(v)
    if out is None:
        return tuple(rows[:2]) if v is None else (*rows[:2], v.clone(memory_format=torch.contiguous_format))
    for source, target in zip(rows, out):
        if out_index is None:
            target.copy_(source)
        else:
            target.index_copy_(-3, out_index.long(), source)
    return tuple(out)

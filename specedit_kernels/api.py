"""The public functions: check arguments, then dispatch.

CUDA tensors run Triton, all others the plain PyTorch reference. A GPU's first call checks every kernel, and PyTorch
takes the place of those that fail, with one warning (`specedit_kernels.verdict`). `backend="triton"`, `"merged"` or
`"torch"` chooses explicitly and raises where the choice cannot run; nothing ever falls back silently. "merged" is
PyTorch too: attention with a bias is merged from unbiased passes of its fused attention, and every other function is
that of "torch". Plain PyTorch is differentiable in reverse and in forward mode and works inside `torch.func`. The
Triton kernels and merged attention are for inference: they have no derivatives, and raise RuntimeError where one would
be lost.

Wrong dtypes and types raise TypeError; wrong shapes, devices and values raise ValueError; both say what was expected
and what came. Values inside CUDA tensors (indices, cu_seqlens) are not read, because that would make the host wait:
the kernels skip what is out of range instead of touching memory outside, and SPECEDIT_KERNELS_DEBUG=1 makes such
calls raise as they do on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from . import checks, derivatives, merged_operator, ops, ready, reference, verdict
from .block_keep import BlockKeep, check_fits, names_all_keys
from .key_groups import KeyGroups
from .planning import AttentionPlan


def available_backends() -> tuple[str, ...]:
    """The backends of this machine: "merged" and "torch", and "triton" if Triton is installed and there is a CUDA
    device, or its interpreter is on (TRITON_INTERPRET=1)."""
    has_triton = importlib.util.find_spec("triton") is not None
    if has_triton and (torch.cuda.is_available() or _interpreting()):
        return ("triton", "merged", "torch")
    return ("merged", "torch")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _call(backend: str | None, name: str, tensor: torch.Tensor, args: tuple[Any, ...]) -> Any:
    """Run an operator on the chosen backend; None: by the device of `tensor`."""
    on_gpu = tensor.device.type == "cuda"
    if backend == "triton" and not on_gpu and not _interpreting():
        raise ValueError(f'backend: expected CUDA tensors for "triton", got {tensor.device}')
    native = "triton" if on_gpu else "torch"
    # Only attention differs, which `mixed_attention` calls by itself.
    chosen = "torch" if backend == "merged" else backend or native
    if chosen == "triton":
        if backend == "triton":
            verdict.require(name, tensor.device)
        derivatives.refuse(name, args)
        if not on_gpu and derivatives.transforms_active():
            raise RuntimeError(
                f'{name}: expected no torch.func transform in Triton\'s interpreter, got one; use backend="torch"'
            )
    # The default goes through the dispatcher, which torch.compile sees as one operator. Otherwise derivatives and
    # torch.func see the operations inside.
    inside = chosen == "torch" and (derivatives.transforms_active() or derivatives.needed(args))
    return ops.dispatch(name, args) if chosen == native and not inside else ops.run(chosen, name, args)


def _repeat(backend: str | None, name: str, args: tuple[Any, ...]) -> Any:
    """The result of a call like an earlier one, whose checks need no repetition, or `ready.MISSED`."""
    if backend == "triton" and not (isinstance(args[0], torch.Tensor) and ready.on_gpu(args[0])):
        return ready.MISSED  # in the interpreter
    return ready.MISSED if backend not in (None, "triton") else ready.repeat(name, args, ops.check_memory)


def _into(backend: str | None, name: str, args: tuple[Any, ...], out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`out`, written by an operator's twin: it has the dtype of `like` and the shape of the operator's result."""
    checks.expect_out("out", out, ops.result_shape(name, args), like)
    _call(backend, f"{name}_out", like, (*args, out))
    return out


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in checks.BACKENDS:
        raise ValueError(f"backend: expected one of {checks.BACKENDS} or None, got {backend!r}")


def gather_tokens(
    x: torch.Tensor, index: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Select tokens: `y[..., m, :] = x[..., index[m], :]`.

    Args:
        x: (N, C) or (B, N, C), any float dtype, int32 or int64, any strides.
        index: (M,), shared by the batch, or (B, M); int32 or int64, values in [0, N). On CUDA a row whose index is
            out of range comes out as zeros (or raises, see the module's note on SPECEDIT_KERNELS_DEBUG).
        out: tensor to write into, of the result's shape and dtype, contiguous; shares no memory with the others.
        backend: "triton", "torch" or None (by device).

    Returns:
        (M, C) or (B, M, C), contiguous, dtype of `x`; `out` if given. A (N, C) `x` with a (B, M) index is read B
        times.

    Raises:
        TypeError: not a tensor, or an index that is not int32 or int64.
        ValueError: shapes or devices that do not fit, an index out of range, an unknown backend.
    """
    name, args = ("gather_tokens", (x, index)) if out is None else ("gather_tokens_out", (x, index, out))
    again: torch.Tensor = _repeat(backend, name, args)
    if again is not ready.MISSED:
        return again
    _check_backend(backend)
    checks.check_gather(x, index)
    if out is not None:
        return _into(backend, "gather_tokens", (x, index), out, x)
    y: torch.Tensor = _call(backend, "gather_tokens", x, (x, index))
    return y


def scatter_tokens(
    src: torch.Tensor, index: torch.Tensor, out: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Place tokens: `out[..., index[m], :] = src[..., m, :]`, in place; other rows are unchanged.

    Args:
        src: (M, C) or (B, M, C), dtype of `out`.
        index: (M,), shared by the batch, or (B, M) for a batched `out`; int32 or int64, values in [0, N), each at most
            once per sample (which of several rows wins is not defined). On CUDA a row out of range is skipped.
        out: (N, C) or (B, N, C), written in place, any strides that do not overlap; shares no memory with `src`.
        backend: "triton", "torch" or None (by device).

    Returns:
        `out` itself.

    Raises:
        TypeError: dtypes that differ, or an index that is not int32 or int64.
        ValueError: shapes or devices that do not fit, an index out of range, an `out` that overlaps itself or the
            other tensors, an unknown backend.
    """
    if _repeat(backend, "scatter_tokens", (src, index, out)) is not ready.MISSED:
        return out
    _check_backend(backend)
    checks.check_scatter(src, index, out)
    _call(backend, "scatter_tokens", out, (src, index, out))
    return out


def expand_tokens(
    coarse: torch.Tensor,
    sigma: float,
    *,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    detail: torch.Tensor | None = None,
    patch: int = 2,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, float]:
    """Split every coarse token of a flow-matching state into four fine ones, with exactly the right noise.

    A state is `x_s = (1 - s) x0 + s e`. Every latent pixel z of a coarse token becomes a 2x2 block of pixels through
    the orthonormal 4x4 Hadamard matrix. The three detail coefficients carry fresh noise:

        s' = 2s / (1 + s)
        c = [2 / (1 + s) * z, d1, d2, d3],  d = (1 - s') * detail + s' * noise
        f00 = (c0 + c1 + c2 + c3) / 2    f01 = (c0 - c1 + c2 - c3) / 2
        f10 = (c0 + c1 - c2 - c3) / 2    f11 = (c0 - c1 - c2 + c3) / 2

    If the noise of z is white with standard deviation s, that of the block is white with s'. The block has the energy
    of its coefficients.

    Args:
        coarse: (..., M, C), tokens of `patch` * `patch` latent pixels. Packed tokens (`patch=2`) are in diffusers'
            order: C = channels * 2 * 2, channel slowest, so pixel (a, b) of a channel is at
            `channel * 4 + a * 2 + b`. Pixel (a, b) becomes the four pixels of child token (a, b).
            Unpacked tokens (`patch=1`) are one pixel, C = channels. Child token (a, b) is pixel f_ab.
        sigma: noise level s of `coarse`, inside (0, 1).
        noise: standard normal, or None to draw it: (..., M, 4, channels, 3), unpacked (..., M, channels, 3).
        generator: where the noise comes from: one generator, or one per sample (the axes before M are the batch). A
            sample's numbers do not depend on the samples after it; with one generator per sample they depend on none.
            On CUDA the kernel draws from Philox, seeded from the generator; on the CPU it is `torch.randn`.
        detail: Hadamard detail of known content (clean, noise level 0), of the noise's shape, or None for 0.
        patch: side of a token's patch in latent pixels: 2 for packed latents, 1 for unpacked ones.
        out: tensor to write into, of the shape and dtype of `fine`, contiguous; shares no memory with the others.
        backend: "triton", "torch" or None (by device).

    Returns:
        `fine` (..., M, 4, C), children row-major, dtype of `coarse`, contiguous; and s'.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes, devices or a patch that do not fit, sigma outside (0, 1) or NaN, both noise and generator.

    Source: derived from the flow-matching state and the orthonormal Haar basis; docs/kernels.md has the derivation.
    """
    _check_backend(backend)
    checks.check_expand(coarse, noise, generator, detail, patch)
    sigma = checks.check_sigma("sigma", sigma)
    seed = None
    if noise is None:
        if backend in ("merged", "torch") or (coarse.device.type != "cuda" and backend is None):
            dtype = torch.float64 if coarse.dtype == torch.float64 else torch.float32
            noise = reference.draw_noise(coarse, patch, generator, dtype=dtype)
        else:
            seed = reference.draw_seeds(generator, coarse)
    args = (coarse, sigma, noise, seed, detail, int(patch))
    if out is not None:
        return _into(backend, "expand_tokens", args, out, coarse), reference.fine_sigma(sigma)
    fine = _repeat(backend, "expand_tokens", args)
    if fine is ready.MISSED:
        fine = _call(backend, "expand_tokens", coarse, args)
    return fine, reference.fine_sigma(sigma)


def contract_tokens(
    fine: torch.Tensor,
    sigma_fine: float,
    *,
    patch: int = 2,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, float]:
    """Merges four fine tokens into their coarse one: the inverse of `expand_tokens` on the mean of every 2x2 block.

        s = s' / (2 - s'),  z = (1 + s) * (f00 + f01 + f10 + f11) / 4

    Args:
        fine: (..., M, 4, C), children row-major, C = channels * patch * patch, channel slowest.
        sigma_fine: noise level s' of `fine`, inside (0, 1).
        patch: side of a token's patch in latent pixels. With 2 (packed latents) the block is a child's own four pixels,
            with 1 (unpacked latents) it is the four children.
        out: tensor to write into, of the shape and dtype of `coarse`, contiguous; shares no memory with `fine`.
        backend: "triton", "torch" or None (by device).

    Returns:
        `coarse` (..., M, C), dtype of `fine`, contiguous; and s.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or a patch that do not fit, sigma_fine outside (0, 1) or NaN, an unknown backend.
    """
    _check_backend(backend)
    checks.check_contract(fine, patch)
    sigma_fine = checks.check_sigma("sigma_fine", sigma_fine)
    args = (fine, sigma_fine, int(patch))
    if out is not None:
        return _into(backend, "contract_tokens", args, out, fine), reference.coarse_sigma(sigma_fine)
    coarse = _call(backend, "contract_tokens", fine, args)
    return coarse, reference.coarse_sigma(sigma_fine)


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    block_keep: BlockKeep | None = None,
    key_groups: KeyGroups | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    block_keep: BlockKeep | None = None,
    key_groups: KeyGroups | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    plan: AttentionPlan | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    block_keep: BlockKeep | None = None,
    key_groups: KeyGroups | None = None,
    scale: float | None = None,
    return_lse: bool,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    key_bias: torch.Tensor | None = None,
    block_keep: BlockKeep | None = None,
    key_groups: KeyGroups | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Non-causal attention with a bias per key, over packed or dense sequences.

        out_i = sum_j softmax_j(scale * q_i . k_j + key_bias_j) v_j

    Args:
        q: packed (T_q, H, D) with cu_seqlens, or dense (B, N_q, H, D) without. float16, bfloat16 or float32 (float64
            on the CPU), any strides. On CUDA D is a multiple of 16 up to 256 (128 in float32).
        k, v: packed (T_k, H_kv, D) or dense (B, N_k, H_kv, D), dtype of `q`. H is a multiple of H_kv: query head h
            reads key head `h // (H // H_kv)`, as in grouped-query attention, without a copy of the keys.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, both or neither: sequence b has queries
            `cu_seqlens_q[b]:cu_seqlens_q[b + 1]`, and keys likewise. They start at 0, never decrease and end at T.
        max_seqlen_q: at least the longest query sequence. Optional: it makes the launch grid smaller when sequences
            are many and short.
        key_bias: float32 (T_k,) or (B, N_k), added to the logits of that key after scaling; -inf hides the key (on
            CUDA everything below -2.3e38 does), whose k and v must be finite all the same.
        block_keep: the blocks of keys that each block of queries reads; see `BlockKeep`. Other keys cost nothing. None
            reads every key. Lists that keep every block give the same, bit for bit (docs/kernels.md says when on CUDA).
        key_groups: what `KeyGroups.of(key_bias, cu_seqlens_k)` made, instead of `key_bias`, with backend="merged": made
            once, it spares every call the reading of the bias, for which the host would wait on CUDA.
        scale: factor of the logits; D ** -0.5 when None.
        return_lse: also return the natural logarithm of the softmax denominators.
        plan: what `specedit_kernels.plan` made for these sequences, with their cu_seqlens and maybe the bias, which are
            then not given again.
        out: tensor to write into, of the shape and dtype of `q`, contiguous; with `return_lse` a pair, `lse` the
            second. They share no memory with each other or the other tensors.
        backend: "triton", "merged", "torch" or None (by device). "merged" makes one unbiased pass of PyTorch's fused
            attention for each distinct bias, at most 8 besides -inf, and merges them exactly. It takes any head dim,
            and no `block_keep`.

    Returns:
        `out` (the tensor given, if one is), shape and dtype of `q`, contiguous; with `return_lse` also `lse` float32
        (float64 for float64 inputs), (H, T_q) or (B, H, N_q). A query that sees no key gets 0, and -inf as its lse. On
        CUDA, where offsets are not read, a query that no sequence covers, or that `max_seqlen_q` leaves out, is not
        written at all.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or devices that do not fit, packed tensors without cu_seqlens, only one cu_seqlens,
            cu_seqlens that do not start at 0, go backwards or do not end at T, query heads that are not a multiple of
            the key heads, a `block_keep` for other sizes or whose lists name blocks that the sequence lacks, an unknown
            backend; with "merged" a `block_keep`, too many biases, or `key_groups` of other keys.

    Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 1, with the bias added to the scores; proportional attention
    (arXiv 2210.09461) is `key_bias = log(area)`.
    """
    if key_groups is not None and backend != "merged":
        raise ValueError(f'key_groups: expected None with backend={backend!r}, got groups, which "merged" alone reads')
    kept: tuple[Any, ...] = (None, None, 0, 0)
    if isinstance(block_keep, BlockKeep):
        kept = (block_keep.offsets, block_keep.blocks, block_keep.query_block, block_keep.key_block)
    order: tuple[Any, ...] = (None, 0, None, None, None, 0)
    if plan is not None:
        if not isinstance(plan, AttentionPlan):
            raise TypeError(f"plan: expected what specedit_kernels.plan made, got {type(plan).__name__}")
        cu_seqlens_q, cu_seqlens_k, key_bias = plan.complete(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_bias)
        order = plan.arguments
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_bias, scale, return_lse, *kept, *order)
    name, written = "mixed_attention", out if return_lse else (out, None)
    if out is not None and isinstance(written, tuple) and len(written) == 2:
        name, args = "mixed_attention_out", (*args, *written)
    in_args = out is None or name == "mixed_attention_out"
    if block_keep is not None:
        in_args = in_args and kept[0] is not None and names_all_keys(block_keep, k)
    again: tuple[torch.Tensor, torch.Tensor] = _repeat(backend, name, args) if in_args else ready.MISSED
    if again is not ready.MISSED:
        return again if return_lse else again[0]
    _check_backend(backend)
    checks.check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_bias, scale)
    if block_keep is not None:
        check_fits(block_keep, q, k, packed=cu_seqlens_q is not None)
    if out is not None:
        checks.check_attention_out(out, return_lse, q)
    if backend == "merged":
        _check_merged(k, cu_seqlens_k, key_bias, block_keep, key_groups)
        result, lse = merged_operator.merged_attention(name, args, key_groups)
    elif out is not None:
        _call(backend, name, q, args)
    else:
        result, lse = _call(backend, "mixed_attention", q, args)
    if out is not None:
        return out
    return (result, lse) if return_lse else result


def _check_merged(
    k: torch.Tensor, cu_seqlens_k: torch.Tensor | None, key_bias: torch.Tensor | None,
    block_keep: BlockKeep | None, key_groups: KeyGroups | None,
) -> None:  # fmt: skip
    if block_keep is not None:
        raise ValueError(
            'block_keep: expected None with backend="merged", got lists; "triton" and "torch" read lists of blocks'
        )
    if key_groups is None:
        return
    if not isinstance(key_groups, KeyGroups):
        raise TypeError(f"key_groups: expected KeyGroups, got {type(key_groups).__name__}")
    if key_bias is not None:
        raise ValueError("key_groups: expected None with a key_bias, which they replace, got both")
    key_groups.check_fits(k, cu_seqlens_k)


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
    out: Sequence[torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm of queries and keys, rotary embedding, and placement into a joint layout, in one pass.

        y = x * rsqrt(mean(x ** 2) + eps) * weight                               per head, over D
        (y[2i], y[2i+1]) -> (y[2i] cos_i - y[2i+1] sin_i, y[2i+1] cos_i + y[2i] sin_i)

    Args:
        q, k: (T, H, D) packed or (B, N, H, D) dense, float; D even. Computed in float32 and rounded once.
        q_weight, k_weight: (D,), float.
        cos, sin: float32 (T, D/2); for a dense q (N, D/2), shared by the batch, or (B, N, D/2).
        eps: at least 0, added to the mean square. With 0, rows of any magnitude have a norm, however tiny; a row
            of zeros gives NaN, as in PyTorch.
        v: values to be copied along into the same rows, shape of `q`, or None.
        out_index: (T,) (or (N,), shared by the batch) int32 or int64: row t is written to row `out_index[t]` of `out`,
            each row at most once. Needs `out`. On CUDA a row out of range is skipped.
        out: (q_out, k_out), with `v` (q_out, k_out, v_out), to write into: (T_out, H, D) or (B, N_out, H, D). Without
            `out_index` they have the shape of `q` and may be `q`, `k` and `v` themselves, each its own input; otherwise
            they share no memory with the inputs or each other.
        backend: "triton", "torch" or None (by device).

    Returns:
        (q, k), or (q, k, v) when `v` is given; the tensors of `out` when given.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or devices that do not fit, `out_index` out of range or without `out`, an `out` that overlaps
            itself or another tensor, an unknown backend.

    Source: RMSNorm (arXiv 1910.07467) and RoPE (arXiv 2104.09864), in the order and pairing of FLUX and Qwen-Image.
    """
    inputs, count = (q, k, v, q_weight, k_weight, cos, sin), 2 if v is None else 3
    anew = out is None and out_index is None and ready.can_repeat(q) and ready.plain(inputs)
    if anew and ready.on_gpu(q):
        out = tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(count))
    if anew or (isinstance(out, (tuple, list)) and len(out) == count):
        args = (*inputs, eps, out_index, *(out or (None,) * count), *(None,) * (3 - count))
        if (made := _repeat(backend, "qk_norm_rope", args)) is not ready.MISSED:
            return tuple(out or made)
    _check_backend(backend)
    checks.check_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, v, out_index, out)
    if out is None and derivatives.transforms_active() and backend != "triton" and (backend or q.device.type != "cuda"):
        # vmap does not allow writing its tensors into a new one.
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=float(eps), v=v)
    if out is None and not (anew and backend is None):  # plain PyTorch makes its own
        out = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(count))
    args = (*inputs, float(eps), out_index, *(out or (None,) * count), *(None,) * (3 - count))
    made = _call(backend, "qk_norm_rope", q, args)
    return tuple(out or made)


def weighted_sum(
    stack: torch.Tensor, weights: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """A polynomial over stacked differences: `y = sum_k weights[k] * stack[k]`, read once and written once.

    With `stack[k]` the k-th difference of a feature and `weights[k]` the basis polynomial at the wanted time
    (x^k / k! of a Taylor series, scaled Hermite polynomials, learned coefficients), this is a temporal forecast.

    Args:
        stack: (K, ...), K >= 1, any float dtype; computed in float32 (float64 in float64) and rounded once.
        weights: (K,) float32.
        out: tensor to write into, of the result's shape and dtype, contiguous; shares no memory with the others.
        backend: "triton", "torch" or None (by device).

    Returns:
        (...), dtype of `stack`, contiguous; `out` if given.

    Raises:
        TypeError: dtypes or types that do not fit.
        ValueError: shapes or devices that do not fit, an unknown backend.

    Source: TaylorSeer (arXiv 2503.06923), eq. 4, and its relatives.
    """
    name, args = ("weighted_sum", (stack, weights)) if out is None else ("weighted_sum_out", (stack, weights, out))
    again: torch.Tensor = _repeat(backend, name, args)
    if again is not ready.MISSED:
        return again
    _check_backend(backend)
    checks.check_weighted_sum(stack, weights)
    if out is not None:
        return _into(backend, "weighted_sum", (stack, weights), out, stack)
    y: torch.Tensor = _call(backend, "weighted_sum", stack, (stack, weights))
    return y

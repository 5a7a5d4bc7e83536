"""Argument checks of the public functions. Errors say what was expected and what came.

Shapes, dtypes and devices are checked on every call. Values that live in tensors (`check_index_values`,
`check_cu_seqlens_values`) are checked whenever they are on the CPU, and on a GPU only in debug mode, because reading
them there would make the host wait.
"""

from __future__ import annotations

import itertools
import math
import numbers
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from . import derivatives, overlap, reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
BACKENDS = ("triton", "merged", "torch")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def expect_tensor(
    name: str, value: Any, *, dtypes: Sequence[torch.dtype], dims: Sequence[int], device: torch.device | None = None
) -> None:
    """Raise unless `value` is a tensor with one of the dtypes and dimensionalities, on `device` if given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([value.dtype])}")
    if value.dim() not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def expect_shape(name: str, value: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def expect_out(name: str, out: Any, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raise unless `out` can take a result of this shape, with the dtype and device of `like`."""
    expect_tensor(name, out, dtypes=(like.dtype,), dims=range(9), device=like.device)
    expect_shape(name, out, shape)
    if not out.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(out.stride())}")


def expect_dtype(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {_names([dtype])}, got {_names([value.dtype])}")


def expect_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


_SWITCH = dict.fromkeys(("0", "false", "no", "off"), False) | dict.fromkeys(("1", "true", "yes", "on"), True)


def switch(name: str, *, default: bool = False) -> bool:
    """Whether an environment variable is on; `default` if it is not set or empty.

    Raises:
        ValueError: a value that is not one of 0, 1, false, true, no, yes, off and on (in any case).
    """
    value = os.environ.get(name, "")
    if not value.strip():
        return default
    enabled = _SWITCH.get(value.strip().lower())
    if enabled is None:
        raise ValueError(f"{name}: expected 0, 1, false, true, no, yes, off or on, got {value!r}")
    return enabled


def debug_enabled() -> bool:
    """True if SPECEDIT_KERNELS_DEBUG=1: also check values on a GPU, which synchronises every call."""
    return switch("SPECEDIT_KERNELS_DEBUG")


def values_are_checked(tensor: torch.Tensor) -> bool:
    """False under vmap, which holds many tensors as one; PyTorch checks the range there."""
    return not derivatives.is_batched(tensor) and (tensor.device.type == "cpu" or debug_enabled())


def expect_writable(name: str, out: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    """Raise ValueError if an element of `out` would be written twice, or read and written."""
    if overlap.overlaps_itself(out):
        raise ValueError(
            f"{name}: expected memory of its own for every element, got shape {tuple(out.shape)} with strides "
            f"{tuple(out.stride())}, which overlaps itself; clone it first"
        )
    for other, value in others.items():
        if value is not None and overlap.share_memory(out, value):
            raise ValueError(
                f"{name}: expected no memory in common with {other}, got a tensor that shares it; clone one"
            )


# --- gather and scatter ----------------------------------------------------------------------------------------------


def check_gather(x: torch.Tensor, index: torch.Tensor) -> None:
    expect_tensor("x", x, dtypes=(*FLOATS, torch.int32, torch.int64), dims=(2, 3))
    expect_tensor("index", index, dtypes=INDEX_DTYPES, dims=(1, 2), device=x.device)
    if x.dim() == 3 and index.dim() == 2 and index.shape[0] != x.shape[0]:
        raise ValueError(f"index: expected batch {x.shape[0]} as in x, got shape {tuple(index.shape)}")


def check_scatter(src: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    expect_tensor("out", out, dtypes=(*FLOATS, torch.int32, torch.int64), dims=(2, 3))
    expect_tensor("src", src, dtypes=(out.dtype,), dims=(out.dim(),), device=out.device)
    expect_tensor("index", index, dtypes=INDEX_DTYPES, dims=(1, 2) if out.dim() == 3 else (1,), device=out.device)
    batch = tuple(out.shape[:-2])
    if index.dim() == 2:
        expect_shape("index", index, (*batch, src.shape[-2]))
    expect_shape("src", src, (*batch, index.shape[-1], out.shape[-1]))


def check_index_values(name: str, index: torch.Tensor, rows: int, *, unique: bool = False) -> None:
    """Raise ValueError unless all entries are in [0, rows), and with `unique` distinct along the last axis."""
    if index.numel() == 0 or not values_are_checked(index):
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name}: expected values in [0, {rows}), got values from {low} to {high}")
    if unique and debug_enabled():
        ordered = index.sort(dim=-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError(f"{name}: expected unique values, got repeated ones")


# --- polynomials over stacked differences ----------------------------------------------------------------------------


def check_weighted_sum(stack: torch.Tensor, weights: torch.Tensor) -> None:
    expect_tensor("stack", stack, dtypes=FLOATS, dims=range(1, 9))
    if stack.shape[0] < 1:
        raise ValueError(f"stack: expected at least one layer, got shape {tuple(stack.shape)}")
    expect_tensor("weights", weights, dtypes=(torch.float32,), dims=(1,), device=stack.device)
    expect_shape("weights", weights, (stack.shape[0],))


# --- expand and contract ---------------------------------------------------------------------------------------------


def check_sigma(name: str, sigma: Any) -> float:
    """The noise level as a Python float; reading a one-element tensor on a GPU synchronises."""
    if isinstance(sigma, torch.Tensor):
        if derivatives.needed((sigma,)):
            raise RuntimeError(
                f"{name}: expected a number, got a tensor with a derivative, which reading it would lose"
            )
        if sigma.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(sigma.shape)}")
        sigma = sigma.item()
    expect_number(name, sigma)
    if not 0 < sigma < 1:  # also catches NaN
        raise ValueError(f"{name}: expected a value inside (0, 1), got {sigma}")
    return float(sigma)


def check_patch(name: str, tokens: torch.Tensor, patch: Any) -> None:
    """Raises unless `patch` is 1 or 2 and the channels of `tokens` are whole patches."""
    if isinstance(patch, bool) or not isinstance(patch, (int, torch.SymInt)):
        raise TypeError(f"patch: expected an int, got {type(patch).__name__}")
    if patch not in (1, 2):
        raise ValueError(f"patch: expected 1 (unpacked: one latent pixel a token) or 2 (packed: 2x2), got {patch}")
    if patch == 2 and tokens.shape[-1] % 4:
        raise ValueError(f"{name}: expected a channel count divisible by patch*patch = 4, got {tokens.shape[-1]}")


def check_expand(
    coarse: torch.Tensor,
    noise: torch.Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    detail: torch.Tensor | None,
    patch: int,
) -> None:
    expect_tensor("coarse", coarse, dtypes=FLOATS, dims=range(2, 9))
    check_patch("coarse", coarse, patch)
    shape = reference.noise_shape(coarse, patch)
    for name, value in (("noise", noise), ("detail", detail)):
        if value is not None:
            expect_tensor(name, value, dtypes=FLOATS, dims=(len(shape),), device=coarse.device)
            expect_shape(name, value, shape)
    if generator is None:
        return
    if noise is not None:
        raise ValueError("generator: expected None when noise is given, got both")
    generators: Sequence[Any] | None = generator if isinstance(generator, (list, tuple)) else None
    for one in [generator] if generators is None else generators:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator: expected torch.Generator or a list of them, got {type(one).__name__}")
    batch = math.prod(coarse.shape[:-2])
    if generators is not None and len(generators) != batch:
        raise ValueError(f"generator: expected one per sample ({batch}), got a list of {len(generators)}")


def check_contract(fine: torch.Tensor, patch: int) -> None:
    expect_tensor("fine", fine, dtypes=FLOATS, dims=range(3, 10))
    if fine.shape[-2] != 4:
        raise ValueError(f"fine: expected 4 children on axis -2, got shape {tuple(fine.shape)}")
    check_patch("fine", fine, patch)


# --- attention -------------------------------------------------------------------------------------------------------


def expect_layout(q: torch.Tensor, packed: bool) -> None:
    """Raise ValueError unless `q` is packed with cu_seqlens, or dense without."""
    if q.dim() == 3 and not packed:
        raise ValueError(
            "q: expected 4 dimensions (B, N, H, D) without cu_seqlens; packed tensors (T, H, D) need cu_seqlens_q and "
            f"cu_seqlens_k, got shape {tuple(q.shape)} and neither"
        )
    if q.dim() == 4 and packed:
        raise ValueError(f"q: expected 3 dimensions (T, H, D) with cu_seqlens, got shape {tuple(q.shape)}")


def warn_of_heads_first(q: torch.Tensor) -> None:
    """Both layouts fit: a tensor with more heads than tokens has perhaps its axes in PyTorch's order."""
    axes = "(B, N, H, D)" if q.dim() == 4 else "(T, H, D)"
    warnings.warn(
        f"q: expected {axes}, got shape {tuple(q.shape)} with more heads than tokens; if the heads come first, as in "
        "scaled_dot_product_attention, pass x.transpose(-3, -2)",
        stacklevel=4,
    )


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_bias: torch.Tensor | None,
    scale: float | None,
) -> None:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        given, missing = ("cu_seqlens_q", "cu_seqlens_k") if cu_seqlens_k is None else ("cu_seqlens_k", "cu_seqlens_q")
        raise ValueError(f"expected both cu_seqlens_q and cu_seqlens_k or neither, got {given} without {missing}")
    packed = cu_seqlens_q is not None
    expect_tensor("q", q, dtypes=FLOATS, dims=(3, 4))
    expect_layout(q, packed)
    for name, value in (("k", k), ("v", v)):
        expect_tensor(name, value, dtypes=(q.dtype,), dims=(q.dim(),), device=q.device)
    expect_shape("k", k, (*q.shape[:-3], *k.shape[-3:-1], q.shape[-1]))
    expect_shape("v", v, k.shape)
    heads, shared = q.shape[-2], k.shape[-2]
    if not torch.compiler.is_compiling() and heads > q.shape[-3] > 1 and shared > k.shape[-3] > 1:
        warn_of_heads_first(q)
    if heads != shared and (shared == 0 or heads == 0 or heads % shared):
        raise ValueError(f"k: expected as many heads as q has ({heads}) or a divisor of it, got {shared}")
    if q.shape[-1] == 0:
        raise ValueError("q: expected a head dim of at least 1, got 0")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            expect_tensor(name, value, dtypes=(torch.int32,), dims=(1,), device=q.device)
        if cu_seqlens_q.shape[0] < 2:
            raise ValueError(f"cu_seqlens_q: expected at least 2 entries, got {cu_seqlens_q.shape[0]}")
        expect_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    if max_seqlen_q is not None:
        if not packed:
            raise ValueError("max_seqlen_q: expected None without cu_seqlens, got a value")
        if isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, (int, torch.SymInt)):
            raise TypeError(f"max_seqlen_q: expected an int, got {type(max_seqlen_q).__name__}")
        if max_seqlen_q < 0:
            raise ValueError(f"max_seqlen_q: expected at least 0, got {max_seqlen_q}")
    if key_bias is not None:
        expect_tensor("key_bias", key_bias, dtypes=(torch.float32,), dims=(1,) if packed else (2,), device=q.device)
        expect_shape("key_bias", key_bias, k.shape[:-2])
    if scale is not None:
        expect_number("scale", scale)
        if not -math.inf < scale < math.inf:  # math.isfinite rejects torch.compile's symbolic floats
            raise ValueError(f"scale: expected a finite number, got {scale}")


def check_attention_out(out: Any, return_lse: bool, q: torch.Tensor) -> None:
    if not return_lse:
        expect_out("out", out, q.shape, q)
        return
    if not isinstance(out, tuple) or len(out) != 2:
        got = f"{len(out)} entries" if isinstance(out, tuple) else type(out).__name__
        raise ValueError(f"out: expected a pair (out, lse) with return_lse, got {got}")
    expect_out("out[0]", out[0], q.shape, q)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    like = q.new_empty(0, dtype=lse_dtype)
    expect_out("out[1]", out[1], (*q.shape[:-3], q.shape[-2], q.shape[-3]), like)


def check_cu_seqlens_values(
    name: str, cu_seqlens: torch.Tensor, total: int, longest: int | None = None, *, read: bool = False
) -> None:
    """Raise ValueError unless the offsets start at 0, never decrease, end at `total` and respect `longest`.

    With `read` they are looked at wherever they are.
    """
    if not read and not values_are_checked(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(f"{name}: expected offsets from 0 to {total}, got {ends[0]} to {ends[-1]}")
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if min(lengths) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"{name}: expected offsets that never decrease, got {ends[at]} then {ends[at + 1]}")
    if longest is not None and max(lengths) > longest:
        raise ValueError(f"max_seqlen_q: expected at least the longest sequence ({max(lengths)}), got {longest}")


# --- query and key preparation ---------------------------------------------------------------------------------------


def check_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    v: torch.Tensor | None,
    out_index: torch.Tensor | None,
    out: Sequence[torch.Tensor] | None,
) -> None:
    expect_tensor("q", q, dtypes=FLOATS, dims=(3, 4))
    same = [("k", k)] + ([("v", v)] if v is not None else [])
    for name, value in same:
        expect_tensor(name, value, dtypes=(q.dtype,), dims=(q.dim(),), device=q.device)
        expect_shape(name, value, q.shape)
    dim = q.shape[-1]
    if dim % 2:
        raise ValueError(f"q: expected an even head dim, got {dim}")
    for name, value in (("q_weight", q_weight), ("k_weight", k_weight)):
        expect_tensor(name, value, dtypes=FLOATS, dims=(1,), device=q.device)
        expect_shape(name, value, (dim,))
    for name, value in (("cos", cos), ("sin", sin)):
        expect_tensor(name, value, dtypes=(torch.float32,), dims=(2, 3) if q.dim() == 4 else (2,), device=q.device)
        expect_shape(name, value, (*q.shape[q.dim() - 1 - value.dim() : -2], dim // 2))
    expect_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if out_index is not None and out is None:
        raise ValueError("out: expected tensors to write into when out_index is given, got None")
    if out is None:
        return
    count = 2 if v is None else 3
    if not isinstance(out, (tuple, list)) or len(out) != count:
        got = f"{len(out)} entries" if isinstance(out, (tuple, list)) else type(out).__name__
        raise ValueError(f"out: expected {count} tensors, one for each of q, k and v as given, got {got}")
    for i, value in enumerate(out):
        expect_tensor(f"out[{i}]", value, dtypes=(q.dtype,), dims=(q.dim(),), device=q.device)
        rows = q.shape[-3] if out_index is None else out[0].shape[-3]
        expect_shape(f"out[{i}]", value, (*q.shape[:-3], rows, *q.shape[-2:]))
    if out_index is not None:
        expect_tensor("out_index", out_index, dtypes=INDEX_DTYPES, dims=(1,), device=q.device)
        expect_shape("out_index", out_index, (q.shape[-3],))


def check_norm_rope_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_index: torch.Tensor | None,
    out: Sequence[torch.Tensor | None],
) -> None:
    """Raise ValueError unless each of `out` has its own memory, or without `out_index` that of its input."""
    given = [value for value in out if value is not None]
    read = [value for value in (q, k, v, q_weight, k_weight, cos, sin, out_index) if value is not None]
    if not given or overlap.clearly_apart(given, read):
        return
    inputs = {"q": q, "k": k, "v": v}
    fixed = {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "out_index": out_index}
    written = {f"out[{i}]": value for i, value in enumerate(out) if value is not None}
    for at, ((name, value), (own, source)) in enumerate(zip(written.items(), inputs.items())):
        others = inputs | fixed | dict(list(written.items())[:at])
        if out_index is None and source is not None and overlap.same_layout(value, source):
            del others[own]
        expect_writable(name, value, others)

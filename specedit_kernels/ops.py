"""`torch.library` operators: one schema per kernel, with CUDA, plain and shape-only implementations.

Registered this way the kernels are opaque to `torch.compile` (no graph break, dynamic lengths) and may be captured in
CUDA graphs. Values inside tensors are checked here, below the compiler, so a compiled call checks them too.
Operators return fresh tensors or write into arguments marked `(a!)`; nothing returned aliases an argument.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from . import block_keep, checks, derivatives, merged, ready, reference, reference_blocks
from .key_groups import NotMergeable

# Named after the package, so that copies under other names, as the Hub's loader makes, do not collide.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
MINIMUM_TRITON = (3, 6)
PINGPONG = "pingpong"  # the backend "triton", with leave to take the ping-pong kernel of attention

# Numbers that change between steps are Scalar: Dynamo would specialise on a float and recompile for every value.
_SCHEMAS = {
    "gather_tokens": "(Tensor x, Tensor index) -> Tensor",
    "scatter_tokens": "(Tensor src, Tensor index, Tensor(a!) out) -> ()",
    "expand_tokens": (
        "(Tensor coarse, Scalar sigma, Tensor? noise, Tensor? seed, Tensor? detail, int patch=2) -> Tensor"
    ),
    "contract_tokens": "(Tensor fine, Scalar sigma_fine, int patch=2) -> Tensor",
    "mixed_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q,"
        " Tensor? key_bias, Scalar? scale, bool return_lse, Tensor? block_offsets=None, Tensor? blocks=None,"
        " int query_block=0, int key_block=0, Tensor? query_tiles=None, int tile_rows=0,"
        " Tensor? key_order=None, Tensor? key_counts=None, Tensor? tile_bias=None, int tile_keys=0) -> (Tensor, Tensor)"
    ),
    "qk_norm_rope": (
        "(Tensor q, Tensor k, Tensor? v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps,"
        " Tensor? out_index, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out) -> ()"
    ),
    "weighted_sum": "(Tensor stack, Tensor weights) -> Tensor",
}
# Twins that write into a tensor of the caller instead of returning one, named NAME_out.
_OUTS = dict.fromkeys(("gather_tokens", "expand_tokens", "contract_tokens", "weighted_sum"), "Tensor(a!) out")
_OUTS["mixed_attention"] = "Tensor(a!) out, Tensor(b!)? lse"
for _name, _written in _OUTS.items():
    _arguments = re.sub(r"=\w+", "", _SCHEMAS[_name].rpartition(") ->")[0])  # no defaults before what has none
    _SCHEMAS[f"{_name}_out"] = f"{_arguments}, {_written}) -> ()"


# --- plain PyTorch behind the operators' schemas ----------------------------------------------------------------------


def _scatter_tokens_torch(src: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    reference.scatter_tokens(src, index, out)


def _expand_tokens_torch(
    coarse: torch.Tensor,
    sigma: float,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    detail: torch.Tensor | None,
    patch: int = 2,
) -> torch.Tensor:
    if noise is None:
        assert seed is not None  # api.py draws one where no noise is given
        noise = reference.philox_noise(seed, reference.noise_shape(coarse, patch), patch)
    return reference.expand_tokens(coarse, sigma, noise=noise, detail=detail, patch=patch)[0]


def _contract_tokens_torch(fine: torch.Tensor, sigma_fine: float, patch: int = 2) -> torch.Tensor:
    return reference.contract_tokens(fine, sigma_fine, patch=patch)[0]


def _mixed_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_bias: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    block_offsets: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    query_block: int = 0,
    key_block: int = 0,
    *order: Any,  # of a plan, which kernels alone read
) -> tuple[torch.Tensor, torch.Tensor]:
    attend = reference.mixed_attention
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if block_offsets is not None and blocks is not None:
        attend = functools.partial(
            reference_blocks.mixed_attention, offsets=block_offsets, blocks=blocks, sizes=(query_block, key_block)
        )
    result = attend(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, key_bias=key_bias, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip
    return result if isinstance(result, tuple) else (result, q.new_empty(0, dtype=torch.float32))


def _qk_norm_rope_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    out_index: torch.Tensor | None,
    q_out: torch.Tensor | None,
    k_out: torch.Tensor | None,
    v_out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The operator itself returns nothing. Called outside the dispatcher without outputs, this gives new tensors."""
    out = tuple([one for one in (q_out, k_out, v_out) if one is not None])
    made = reference.qk_norm_rope(
        q, k, q_weight, k_weight, cos, sin, eps=eps, v=v, out_index=out_index, out=out or None
    )
    return out or tuple([one.contiguous() for one in made])


_TORCH: dict[str, Callable[..., Any]] = {
    "gather_tokens": reference.gather_tokens,
    "scatter_tokens": _scatter_tokens_torch,
    "expand_tokens": _expand_tokens_torch,
    "contract_tokens": _contract_tokens_torch,
    "mixed_attention": _mixed_attention_torch,
    "qk_norm_rope": _qk_norm_rope_torch,
    "weighted_sum": reference.weighted_sum,
}


def _into(functional: Callable[..., Any], count: int) -> Callable[..., None]:
    """The twin of an operator that writes its results into its last `count` arguments."""

    def call(*args: Any) -> None:
        results = functional(*args[:-count])
        copy_into(args[-count:], results if isinstance(results, tuple) else (results,))

    return call


def copy_into(targets: tuple[torch.Tensor | None, ...], results: tuple[torch.Tensor, ...]) -> None:
    """Copy each result that has a target."""
    for target, result in zip(targets, results):
        if target is not None:
            target.copy_(result)


_TORCH.update({f"{name}_out": _into(_TORCH[name], written.count("!")) for name, written in _OUTS.items()})


def _mixed_attention_merged(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return merged.mixed_attention(*args[:9])


_MERGED: dict[str, Callable[..., Any]] = {
    "mixed_attention": _mixed_attention_merged,
    "mixed_attention_out": _into(_mixed_attention_merged, 2),
}


# --- shapes only -----------------------------------------------------------------------------------------------------


def _gather_tokens_fake(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    batch = x.shape[:1] if x.dim() == 3 else index.shape[:-1]
    return x.new_empty((*batch, index.shape[-1], x.shape[-1]))


def _expand_tokens_fake(
    coarse: torch.Tensor,
    sigma: float,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    detail: torch.Tensor | None,
    patch: int = 2,
) -> torch.Tensor:
    return coarse.new_empty((*coarse.shape[:-1], 4, coarse.shape[-1]))


def _contract_tokens_fake(fine: torch.Tensor, sigma_fine: float, patch: int = 2) -> torch.Tensor:
    return fine.new_empty((*fine.shape[:-2], fine.shape[-1]))


def mixed_attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_bias: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    block_offsets: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    query_block: int = 0,
    key_block: int = 0,
    *order: Any,  # of a plan, which kernels alone read
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if return_lse else (0,)
    dtype = torch.float64 if return_lse and q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(shape, dtype=dtype)


def _weighted_sum_fake(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return stack.new_empty(stack.shape[1:])


def _nothing(*args: Any) -> None:
    return None


_FAKE: dict[str, Callable[..., Any]] = {
    "gather_tokens": _gather_tokens_fake,
    "scatter_tokens": _nothing,
    "expand_tokens": _expand_tokens_fake,
    "contract_tokens": _contract_tokens_fake,
    "mixed_attention": mixed_attention_fake,
    "qk_norm_rope": _nothing,
    "weighted_sum": _weighted_sum_fake,
}
_FAKE.update({f"{name}_out": _nothing for name in _OUTS})


# --- value checks, and putting it together ---------------------------------------------------------------------------


def check_values(backend: str, name: str, args: tuple[Any, ...]) -> None:
    name = name.removesuffix("_out")
    if name == "gather_tokens":
        x, index = args[:2]
        checks.check_index_values("index", index, x.shape[-2])
    elif name == "scatter_tokens":
        _, index, out = args
        checks.check_index_values("index", index, out.shape[-2], unique=True)
    elif name == "mixed_attention":
        read = backend == "torch"  # it reads them anyway
        if args[3] is not None:
            checks.check_cu_seqlens_values("cu_seqlens_q", args[3], args[0].shape[0], args[5], read=read)
            checks.check_cu_seqlens_values("cu_seqlens_k", args[4], args[1].shape[0], read=read)
        if len(args) > 9 and args[9] is not None:
            block_keep.check_values(args[:13], read=read)
    elif name == "qk_norm_rope" and args[8] is not None:
        checks.check_index_values("out_index", args[8], args[9].shape[-3], unique=True)


@functools.cache
def _names(name: str) -> list[str]:
    """Names of an operator's arguments."""
    arguments = _SCHEMAS[name].partition(") ->")[0].strip("(")
    return [argument.partition("=")[0].split()[-1] for argument in arguments.split(", ")]


def check_memory(name: str, args: tuple[Any, ...]) -> None:
    """Raise ValueError if an operator would write an element twice, or read what it writes."""
    if name == "scatter_tokens":
        src, index, out = args
        checks.expect_writable("out", out, {"src": src, "index": index})
    elif name == "qk_norm_rope":
        q, k, v, q_weight, k_weight, cos, sin, _, out_index, *out = args
        checks.check_norm_rope_memory(q, k, v, q_weight, k_weight, cos, sin, out_index, out)
    elif name.endswith("_out"):
        count = _OUTS[name.removesuffix("_out")].count("!")
        tensors: dict[str, torch.Tensor | None] = {
            key: value for key, value in zip(_names(name), args) if isinstance(value, torch.Tensor)
        }
        written = {key: value for key in _names(name)[-count:] if (value := tensors.pop(key, None)) is not None}
        for key, value in written.items():
            checks.expect_writable(key, value, tensors)
            tensors[key] = value


def run(backend: str, name: str, args: tuple[Any, ...]) -> Any:
    """Run one operator on one backend, outside the dispatcher. This is where Triton is imported."""
    check_values(backend, name, args)
    check_memory(name, args)
    if backend == "torch":
        return _TORCH[name](*args)
    if backend == "merged":
        return _MERGED[name](*args)
    check_triton()
    from . import gpu

    call = gpu.prepare(name, args, pingpong=backend == PINGPONG)
    result = call(*args)
    if ready.on_gpu(args[0]):  # not in the interpreter
        ready.remember(name, args, call)
    return result


@functools.cache
def check_triton() -> None:
    try:
        import triton

        found = triton.__version__
    except ModuleNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < MINIMUM_TRITON:
        wanted = ".".join(map(str, MINIMUM_TRITON))
        raise ImportError(
            f'expected Triton {wanted} or newer to run kernels, found {found}; use backend="torch", '
            'in specedit.install attention="torch"'
        )


def result_shape(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Of an operator that returns one tensor."""
    return tuple(_FAKE[name](*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)).shape)


def check_gpu(device: torch.device) -> None:
    """Nothing, on a GPU that the kernels run on.

    Raises:
        ImportError: Triton is missing or too old.
        RuntimeError: the GPU is too old, or Triton finds no C compiler.
    """
    check_triton()
    from .gpu.launch import check_compiler, check_device

    check_device(device)
    check_compiler()


def _always_triton(name: str, args: tuple[Any, ...]) -> str:
    return "triton"


_choose: Callable[[str, tuple[Any, ...]], str] = _always_triton


def choose_backends_by(choose: Callable[[str, tuple[Any, ...]], str]) -> None:
    """Have a function of an operator's name and arguments choose the backend of calls on a GPU that name none."""
    global _choose
    _choose = choose


def _run_native(backend: str, name: str, args: tuple[Any, ...]) -> Any:
    """Run an operator on its device's backend. On a GPU, PyTorch stands in for a kernel that failed its check there."""
    if backend != "triton":
        return run(backend, name, args)
    try:
        return run(_choose(name, args), name, args)
    except NotMergeable:
        return run("torch", name, args)


def _run_torch(name: str, *args: Any) -> Any:
    """As a prepared launch: an operator that writes into its caller's tensors gives them."""
    result = run("torch", name, args)
    if not name.endswith("_out"):
        return result
    return args[-2:] if name == "mixed_attention_out" else args[-1]


def _implementation(backend: str, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = ready.repeat(name, args, check_memory) if backend == "triton" else ready.MISSED
        if result is ready.MISSED:
            result = _run_native(backend, name, args)
        if name == "mixed_attention" and result[1] is None:
            return result[0], result[0].new_empty(0, dtype=torch.float32)
        return None if name.endswith("_out") or name in ready.WRITES else result

    return call


def _autograd_implementation(name: str) -> Callable[..., Any]:
    """The autograd implementation: plain PyTorch's derivatives, or an error if Triton would lose them."""

    def call(keyset: Any, *args: Any) -> Any:
        if derivatives.needed(args):
            if args[0].device.type != "cuda":
                return run("torch", name, args)
            derivatives.refuse(name, args)
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return call


for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    # Every device without its own kernels.
    LIBRARY.impl(_name, _implementation("torch", _name), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _implementation("triton", _name), "CUDA")
    LIBRARY.impl(_name, _autograd_implementation(_name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKE[_name], lib=LIBRARY)


def dispatch(name: str, args: tuple[Any, ...]) -> Any:
    """Run one operator through PyTorch's dispatcher, which selects the implementation by device.

    Where nothing watches the dispatcher, its way through is left out, which takes longer than a launch.
    """
    if ready.eager() and ready.plain(args):
        if ready.on_gpu(args[0]):
            return _run_native("triton", name, args)
        result = run("torch", name, args)
        ready.remember(name, args, functools.partial(_run_torch, name))
        return result
    return getattr(getattr(torch.ops, NAMESPACE), name)(*args)

"""The providers of attention timed on this machine, for the shapes of an edit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .api import mixed_attention
from .key_groups import KeyGroups

Sequence = tuple[int, int]  # keys that cover four positions, keys that cover one


@dataclass(frozen=True)
class Shape:
    """Attention calls of one kind. biased: whether coarse keys count four times."""

    name: str
    heads: int
    dim: int
    sequences: tuple[Sequence, ...]
    biased: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, queries and keys alike."""
        return [coarse + fine for coarse, fine in self.sequences]


@dataclass(frozen=True)
class Timing:
    """The median of some calls; None where the provider does not run, and `why` says so."""

    shape: str
    tokens: list[int]
    heads: int
    dim: int
    dtype: str
    provider: str
    ms: float | None = None
    why: str | None = None


def shapes(full_size: bool) -> Iterator[Shape]:
    """FLUX.1-Kontext's stock call, its mixed one with 20 % edited, and Qwen's guidance, two prompts in one launch.

    full_size: pictures of 1024 px with 24 heads of 128; otherwise of 256 px with 2 heads of 64.
    """
    text, cells, heads, dim = (512, 1024, 24, 128) if full_size else (32, 64, 2, 64)
    prompts = (1280, 1216) if full_size else (40, 24)

    def mixed(text: int) -> Sequence:
        edited = round(cells * 0.2)
        return 2 * (cells - edited), text + 2 * 4 * edited

    yield Shape("stock", heads, dim, ((0, text + 8 * cells),), False)
    yield Shape("mixed", heads, dim, (mixed(text),), True)
    yield Shape("packed", heads, dim, tuple(map(mixed, prompts)), True)


def time_all(
    device: torch.device, dtype: torch.dtype, providers: tuple[str, ...], *, full_size: bool, repeats: int
) -> list[Timing]:
    """Time every provider ("triton", "merged" or "torch") on every shape."""
    found = []
    with torch.no_grad():
        for shape in shapes(full_size):
            tensors = _inputs(shape, device, dtype)
            for provider in providers:
                of = (shape.name, shape.lengths, shape.heads, shape.dim, str(dtype).removeprefix("torch."), provider)
                try:
                    ms = milliseconds(_call(shape, provider, *tensors), device, repeats)
                    found.append(Timing(*of, ms=ms))
                except Exception as error:  # the others still count
                    first = (str(error).strip().splitlines() or [""])[0]
                    found.append(Timing(*of, why=f"{type(error).__name__}: {first}"))
    return found


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q, which is k and v too, packed (T, H, D), and the bias (T,)."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(sum(shape.lengths), shape.heads, shape.dim, generator=rng).to(device, dtype)
    bias = torch.cat([torch.tensor([math.log(4)] * coarse + [0.0] * fine) for coarse, fine in shape.sequences])
    return q, bias.to(device)


def _call(shape: Shape, provider: str, q: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call as an edit makes it: one sequence as a dense batch, several packed."""
    more: dict[str, Any] = {"backend": provider}
    if len(shape.sequences) > 1:
        cu = torch.tensor([0, *shape.lengths]).cumsum(0).to(q.device, torch.int32)
        more |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": max(shape.lengths)}
    else:
        cu, q, bias = None, q[None], bias[None]
    if shape.biased:
        more |= {"key_groups": KeyGroups.of(bias, cu)} if provider == "merged" else {"key_bias": bias}
    return lambda: mixed_attention(q, q, q, **more)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one to warm up: on a GPU by events behind a delay that hides the host's time."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # about half a millisecond
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
    return float(statistics.median(times))

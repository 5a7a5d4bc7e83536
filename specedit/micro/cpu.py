"""What makes a CPU faster: for training attention as two matrix products, memory that the process keeps, and the
precision in which this CPU multiplies faster; for everyone pictures whose channels lie side by side.

`scaled_dot_product_attention` on a CPU takes longer over its gradient than the matrix products that it is made of, and
an allocator that gives every large tensor back to the system pays for fresh pages in every step.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


class PlainAttention(TorchFunctionMode):
    """Within this context `scaled_dot_product_attention` is softmax(q k^T / sqrt(d)) v, products and softmax apart.

    Only what training asks for: q, k and v, by position or name. Calls with a mask, causal or not, with dropout, a
    scale of their own or grouped heads go where they went before.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
            q, k, v = (given.pop(name) for name in ARGUMENTS[:3])
            if not any(isinstance(value, Tensor) or value for value in given.values()):
                return attention(q, k, v)
        return function(*args, **kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (..., n, d), k and v (..., m, d), in their dtype."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), -1) @ v


@contextmanager
def fast(device: str) -> Iterator[None]:
    """Attention as products within this context, on a CPU; from then on the process keeps its memory, under glibc."""
    if torch.device(device).type != "cpu":
        yield
        return
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor: huge pages
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)):
            libc.mallopt(option, value)
    with PlainAttention():
        yield


@torch.no_grad()
def channels_last(module: nn.Module) -> None:
    """Let the 3-D convolutions of `module` lay out pictures with the channels last, in place; values stay.

    The norm over the channels that stands before each of Qwen-Image's convolutions reads them one after the other then.
    A convolution of oneDNN's lays out its result as its weight is, so the weights are all there is to change. An
    autoencoder of 2-D ones was no faster for it.
    """
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last_3d)


def autocast(device: str) -> torch.autocast:
    """Training's precision: bfloat16, but float32 on a CPU that multiplies matrices faster in it, as one without
    bfloat16 instructions does."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or bfloat16_is_faster())


@cache
def bfloat16_is_faster(clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether a linear layer of about the editor's size takes less time in bfloat16 than in float32 here, measured."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        F.linear(x, weight)
        times = []
        for _ in range(5):
            began = clock()
            F.linear(x, weight)
            times.append(clock() - began)
        fastest[dtype] = min(times)
    return fastest[torch.bfloat16] < fastest[torch.float32]

"""Faster training on a CPU: attention as matrix products, memory kept by the process, and the faster precision.

The backward pass of a CPU's `scaled_dot_product_attention` is slower than the matrix products that it consists of.
An allocator that returns large tensors to the system pays for fresh pages at every step.
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
from torch import Tensor
from torch.overrides import TorchFunctionMode

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


class PlainAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` by softmax(q k^T / sqrt(d)) v inside the context.

    Only calls with plain q, k and v, by position or name. Calls with a mask, causality, dropout, a scale or grouped
    heads are passed on unchanged.
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
    """On a CPU, `PlainAttention` inside the context; under glibc the process keeps freed memory from then on."""
    if torch.device(device).type != "cpu":
        yield
        return
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor: huge pages
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)):
            libc.mallopt(option, value)
    with PlainAttention():
        yield


def autocast(device: str) -> torch.autocast:
    """Autocast to bfloat16, disabled on a CPU where float32 is faster, such as one without bfloat16 instructions."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or bfloat16_is_faster())


@cache
def bfloat16_is_faster(clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether a linear layer of about the editor's size is measured to be faster in bfloat16 than in float32."""
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

"""Digests of a call's arguments, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PLAIN = (type(None), bool, int, float, str, bytes, np.generic, torch.device, torch.dtype)


class Unknown(TypeError):
    """A value whose content cannot be read."""


def digest(*values: Any) -> bytes:
    """A digest that equal content has in common: of numbers, text, pictures, arrays, tensors, and lists and mappings.

    Of tensors and arrays it also depends on dtype, device and memory layout, which decide how an encoder rounds.

    Raises:
        Unknown: a value of another kind.
    """
    sink = hashlib.sha256()
    for value in values:
        _add(sink, value)
    return sink.digest()


def _add(sink: Any, value: Any) -> None:
    if isinstance(value, PLAIN):
        _write(sink, type(value).__name__, repr(value).encode())
    elif isinstance(value, Mapping):
        _write(sink, f"mapping {len(value)}")
        for key, one in value.items():
            _add(sink, key)
            _add(sink, one)
    elif isinstance(value, (list, tuple)):
        _write(sink, f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}")
        for one in value:
            _add(sink, one)
    elif isinstance(value, Image.Image):
        look = (value.mode, value.size, value.getpalette(), value.info.get("transparency"))
        _write(sink, f"picture {look}", value.tobytes())
    elif isinstance(value, Tensor):
        _add_tensor(sink, value)
    elif type(value) is np.ndarray and value.dtype.kind in "biufc":
        _write(sink, f"array {value.shape} {value.dtype} {value.strides}", value.tobytes())
    else:
        raise Unknown(f"cannot read the content of {type(value).__name__}")


def _add_tensor(sink: Any, value: Tensor) -> None:
    if value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided:
        raise Unknown("cannot read the content of a tensor that is not dense")
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    look = (tuple(value.shape), value.dtype, value.device, value.stride())
    _write(sink, f"tensor {look}", plain.numpy().tobytes())


def _write(sink: Any, kind: str, content: bytes = b"") -> None:
    """Lengths come first, so that no two sequences of parts look alike."""
    for part in (kind.encode(), content):
        sink.update(len(part).to_bytes(8, "little"))
        sink.update(part)

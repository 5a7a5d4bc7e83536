"""Runs Qwen's video VAE on single images without convolving zero-padded frames."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...hold import Hold


class SingleFrameConv(TorchFunctionMode):
    """Inside, causal convolutions of a single frame are 2D convolutions, to within rounding.

    With taps W[0..T-1] in time and zeros for the frames before the first, frame 0 of the output is

        sum_t W[t] * x[t - (T - 1)] = W[T - 1] * x[0],

    so two of three taps are skipped. Only torch's calls in this thread change, and no module: offloading hooks keep
    working, and other users of the autoencoder are not affected.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = {F.pad: _pad, F.conv3d: _conv3d}.get(func, func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def single_frame(vae: nn.Module) -> Iterator[None]:
    """`SingleFrameConv` for Qwen's autoencoder, unless it is compiled; no change for any other.

    A compiled one would recompile. Calls from several threads take turns, because video autoencoders cache the features
    of earlier frames on themselves.
    """
    known = isinstance(vae, AutoencoderKLQwenImage) and not is_compiled(vae)
    with _turn(vae), SingleFrameConv() if known else contextlib.nullcontext():
        yield


class _Turn:
    """The lock of one autoencoder, which holds it in its own `__dict__`; a copy of the autoencoder gets a new one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turn, ()


def _turn(vae: Any) -> contextlib.AbstractContextManager:
    if not isinstance(vae, nn.Module):
        return contextlib.nullcontext()
    turn: _Turn = vars(vae).setdefault("_specedit_turn", _Turn())  # setdefault is atomic
    return Hold(turn.lock)


def is_compiled(vae: nn.Module) -> bool:
    """Whether encode, decode or any module is compiled."""
    if {"encode", "decode"} & vars(vae).keys():  # replaced on the instance, most often by compiled methods
        return True
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in vae.modules())


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Pads without zero frames before a single frame; `_conv3d` expects them to be missing."""
    if x.ndim == 5 and x.shape[2] == 1 and len(pad) == 6 and pad[5] == 0 and mode == "constant" and not value:
        pad = pad[:4]
    return F.pad(x, pad, mode, value)


def _conv3d(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """(B, C, 1, H, W) and taps (O, C / groups, T, h, w) to (B, O, 1, H', W'); anything else as always."""
    padded = padding if isinstance(padding, (int, str)) else padding[0]
    if x.ndim != 5 or x.shape[2] != 1 or padded:
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    if type(weight) not in (Tensor, nn.Parameter):  # a quantised weight cannot be sliced
        x = F.pad(x, (0, 0, 0, 0, weight.shape[2] - 1, 0))
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = (v if isinstance(v, int) else v[-2:] for v in (stride, padding, dilation))
    return F.conv2d(x[:, :, 0], weight[:, :, -1], bias, stride, padding, dilation, groups)[:, :, None]

"""Launches that are prepared once for calls alike in everything but addresses and values."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILING = threading.Lock()  # Python 3.11 cannot parse source in several threads at once, as Triton does
_ADDRESSES = 1024  # at which tensor maps are remembered, for each tensor of a launch


def _hooked() -> bool:
    """Whether a profiler has asked Triton to be told of every launch."""
    runtime = knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


class Descriptor:
    """Makes TMA descriptors over tensors (B, N, H, D) of one shape and strides, as (B, H, N, D) in blocks
    [1, 1, rows, dim_p2]. Leading unit axes cost nothing. Gluon's have a layout in shared memory."""

    __slots__ = ("_fields", "_kind")

    def __init__(self, tensor: torch.Tensor, rows: int, dim_p2: int, layout: Any = None) -> None:
        batch, tokens, heads, dim = tensor.shape
        sample, row, head, channel = tensor.stride()
        self._kind = TensorDescriptor
        if layout is not None:
            from triton.experimental.gluon.nvidia import hopper

            self._kind = hopper.TensorDescriptor
        checked = self._kind(
            tensor, [batch, heads, tokens, dim], [sample, head, row, channel], [1, 1, rows, dim_p2],
            *(() if layout is None else (layout,)),
        )  # fmt: skip
        self._fields = {name: value for name, value in vars(checked).items() if name != "base"}

    def __call__(self, tensor: torch.Tensor) -> Any:
        described = object.__new__(self._kind)  # its checks are done, and take long
        described.__dict__.update(self._fields, base=tensor)
        return described


class _Direct:
    """Triton 3.7's launcher without its loop over the arguments. A tensor map is encoded once for each address."""

    def __init__(self, compiled: CompiledKernel, descriptors: Mapping[int, Descriptor]) -> None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        launcher = compiled.run
        self._launch, self._encode = driver.active.utils.launch, make_tensordesc_arg
        self._start = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
            None, None, None, None, None,  # no hooks and nothing for them, no scratch memory
            launcher.arg_annotations, launcher.kernel_signature,
        )  # fmt: skip
        kinds = compiled.metadata.tensordesc_meta or ()
        self._described: list[tuple[int, Descriptor, Any, dict[int, list[Any]]]] = [
            (at, describe, kind, {}) for (at, describe), kind in zip(descriptors.items(), kinds)
        ]

    @staticmethod
    def fits(compiled: CompiledKernel) -> bool:
        launcher = compiled.run
        known = triton.__version__.startswith("3.7.") and all(compiled.metadata.tensordesc_meta or ())
        return known and not (launcher.global_scratch_size or launcher.profile_scratch_size)

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        values: Sequence[Any] = arguments
        if self._described:
            values, done = [], 0
            for at, describe, kind, maps in self._described:
                tensor = arguments[at]
                encoded = maps.get(address := tensor.data_ptr())
                if encoded is None:
                    if len(maps) >= _ADDRESSES:
                        maps.clear()
                    encoded = maps[address] = self._encode(describe(tensor), kind)
                values += arguments[done:at]
                values += encoded
                done = at + 1
            values += arguments[done:]
        self._launch(*grid, stream, *self._start, values)


class Launch:
    """A kernel with its grid and options. Triton is asked for the compiled variant once.

    It looks for one by type, value and alignment of every argument, which takes longer than the launch itself. So all
    calls of one Launch have arguments alike in these. `descriptors` makes those of some arguments' positions, at which
    a call passes tensors.
    """

    __slots__ = ("_compiled", "_descriptors", "_device", "_grid", "_kernel", "_options", "_run")

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], descriptors: Mapping[int, Descriptor] | None = None,
        **options: int,
    ) -> None:  # fmt: skip
        self._kernel, self._grid, self._options, self._device = kernel, grid, options, 0
        self._descriptors = descriptors or {}
        self._compiled: CompiledKernel | None = None
        self._run: _Direct | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch with `arguments` in the kernel's order, constants included."""
        if self._run is not None and not _hooked():
            self._run(self._grid, driver.active.get_current_stream(self._device), arguments)
            return
        described = list(arguments)
        for at, describe in self._descriptors.items():
            described[at] = describe(arguments[at])
        if self._compiled is not None:
            self._compiled[self._grid](*described)
            return
        with _COMPILING:
            compiled = self._kernel[self._grid](*described, **self._options)
        if isinstance(compiled, CompiledKernel):  # not the interpreter's, nor asynchronous compilation's promise
            self._device = driver.active.get_current_device()
            self._compiled = compiled
            self._run = _Direct(compiled, self._descriptors) if _Direct.fits(compiled) else None

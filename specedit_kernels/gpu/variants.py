"""Launches of a compiled kernel without asking again which one it is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_LIMIT = 1024  # variants remembered per kernel; keys hold strides, so every size of image adds some


class Variants:
    """A kernel and its compiled variants, found by a key of the caller.

    Triton finds them by the type, value and alignment of every argument, which takes longer than the launch itself.
    The caller's key must hold whatever of that can differ between its calls; tests compare the two.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.found: dict[tuple[int, Hashable], CompiledKernel] = {}
        self._compiles = isinstance(kernel, JITFunction)  # not in the interpreter

    def launch(self, key: Hashable, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: int) -> None:
        """Launch with `arguments` in the kernel's order, constants included. `options` are num_warps and the like."""
        if not self._compiles:
            self.kernel[grid](*arguments, **options)
            return
        place = driver.active.get_current_device(), key
        compiled = self.found.get(place)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, **options)
        if isinstance(compiled, CompiledKernel):  # with asynchronous compilation it may be a promise
            if len(self.found) >= _LIMIT:
                self.found.clear()
            self.found[place] = compiled

"""A GPU that is not there: Triton's own compiler, launcher and descriptors over a driver that runs nothing.

    from benchmarks import dry_gpu

    dry_gpu.missing()                      # why it cannot be built here, or None
    with dry_gpu.use((9, 0)) as gpu:       # operators on CPU tensors launch kernels for sm_90
        specedit_kernels.mixed_attention(q, k, v)
        gpu.launches, gpu.maps, gpu.errors, gpu.compiled

The driver (driver.c) is compiled to a libcuda.so.1. It refuses launches and tensor maps that break a documented rule.
Outputs are not written, unless `computes` lets plain PyTorch write them after each launch. With `checks` the first use
checks every kernel, as on a GPU, and `faulty` names operators, or "pingpong", whose results are then wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that a block may use
HERE = Path(__file__).parent


def missing() -> str | None:
    """What this machine lacks, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "needs Triton's compiler, not its interpreter"
    if torch.cuda.is_available():
        return "the real driver is loaded"
    if compiler() is None:
        return "needs a C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs Python's headers"
    return None


def compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def _library() -> ctypes.CDLL:
    """The driver, compiled once a process and loaded in place of libcuda.so.1."""
    import triton

    folder = tempfile.mkdtemp(prefix="dry-gpu-")
    atexit.register(shutil.rmtree, folder)  # Triton 3.6 links each kernel's launcher with the driver
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    target = f"{folder}/libcuda.so.1"
    subprocess.run(
        [compiler(), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", target,
         str(HERE / "driver.c"), "-lpthread"],
        check=True,
    )  # fmt: skip
    library = ctypes.CDLL(target, mode=ctypes.RTLD_GLOBAL)
    for name in ("dry_launches", "dry_maps", "dry_errors"):
        getattr(library, name).restype = ctypes.c_long
    library.dry_text.restype = ctypes.c_char_p
    for number, shared in enumerate(SHARED.values()):
        library.dry_device(number, shared)
    with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):  # Triton links its own module with it
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
    return library


@contextlib.contextmanager
def _knob(knobs: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(knobs, name)
    setattr(knobs, name, value)
    try:
        yield
    finally:
        setattr(knobs, name, previous)


class DryGpu:
    """What happened since `use` or the last `clear`."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.number = list(SHARED).index(10 * capability[0] + capability[1])
        self.compiled: list[str] = []  # names of the kernels that were compiled or read from Triton's cache on disk

    @property
    def launches(self) -> int:
        return int(_library().dry_launches())

    @property
    def maps(self) -> int:
        return int(_library().dry_maps())

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text if line.startswith("error")]

    @property
    def text(self) -> list[str]:
        """One line per launch and per error."""
        return str(_library().dry_text().decode()).splitlines()

    @property
    def kernels(self) -> list[str]:
        """Name of each launched kernel, in order."""
        return [line.split()[1] for line in self.text if line.startswith("launch")]

    def clear(self) -> None:
        _library().dry_clear()
        self.compiled.clear()

    def driver(self) -> Any:
        """Triton's driver for this GPU. The stream is the device's number, which driver.c reads."""
        from triton.backends.nvidia.driver import CudaDriver

        _library()
        driver = CudaDriver()
        driver.get_current_device = lambda: self.number
        driver.set_current_device = lambda device: None
        driver.get_current_stream = lambda device: self.number
        driver.get_device_capability = lambda device=None: self.capability
        return driver


def _without_code(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook on its stages: they end with its own dialect, which is all that a launch needs to know.

    Kernels with tensor maps end with the GPU's dialect, which has the maps' layouts.
    """
    if not arguments:
        return "without code", "without code"  # part of the cache's key
    stages = arguments[1]
    lower = stages["ttgir"]

    def lower_descriptors(module: Any, metadata: dict[str, Any]) -> Any:
        if "tensordesc" in str(module):
            return lower(module, metadata)
        metadata["tensordesc_meta"] = []
        return module

    def describe(module: Any, metadata: dict[str, Any]) -> str:
        sizes = ("shared", "tmem_size", "global_scratch_size", "profile_scratch_size")
        metadata |= dict.fromkeys(sizes, 0) | {"global_scratch_align": 1, "profile_scratch_align": 1}
        metadata["name"] = module.get_entry_func_name() if hasattr(module, "get_entry_func_name") else "kernel"
        return ""

    stages["ttgir"], stages["llir"] = lower_descriptors, describe
    stages["ptx"] = lambda source, metadata: ""
    stages["cubin"] = lambda source, metadata: b"none"
    return None


def broken(name: str, args: tuple[Any, ...], result: Any) -> Any:
    """A result that is plausible and wrong, in the tensors that hold it."""
    written = {"scatter_tokens": args[2:3], "qk_norm_rope": args[9:]}.get(name)
    outputs = written or (result if isinstance(result, tuple) else (result,))
    for output in outputs:
        if output is not None and output.numel():
            output.mul_(1.5)
    return result


@contextlib.contextmanager
def use(
    capability: tuple[int, int], *, computes: bool = False, generates: bool = True, checks: bool = False,
    faulty: Container[str] = (),
) -> Iterator[DryGpu]:  # fmt: skip
    """Operators on CPU tensors launch kernels for a GPU of this capability: (8, 0), (9, 0) or (10, 0).

    With `computes`, plain PyTorch computes what each launch would have. Without `generates`, Triton stops before it
    generates code, which is most of a compilation; shared memory is then unknown, and `compile_check` finds it.
    With `checks`, plain PyTorch computes too, and kernels are checked at the first use.
    """
    from triton import knobs
    from triton.runtime import driver

    from specedit_kernels import api, ops, ready, verdict, verdict_file
    from specedit_kernels import checks as argument_checks
    from specedit_kernels import gpu as kernels
    from specedit_kernels.gpu import launch

    dry = DryGpu(capability)
    file = launch.default_file_name(capability)

    def compiled(*, src: Any, **rest: Any) -> None:
        dry.compiled.append(src.name)

    stock_run = ops.run

    def computed(name: str, args: tuple[Any, ...], result: Any, backend: str = "triton") -> Any:
        if not (computes or checks):
            return result
        result = ops._TORCH[name](*args)
        return broken(name, args, result) if name in faulty or backend in faulty else result

    def run(backend: str, name: str, args: tuple[Any, ...]) -> Any:
        result = stock_run(backend, name, args)
        return computed(name, args, result, backend) if backend in ("triton", ops.PINGPONG) else result

    stock_repeat = ready.repeat

    def repeat(name: str, args: tuple[Any, ...], check_memory: Any) -> Any:
        result = stock_repeat(name, args, check_memory)
        return result if result is ready.MISSED else computed(name, args, result)

    replaced = [
        (kernels, "check_device", lambda device: None),
        (launch, "file_of", lambda device: file),
        (launch, "check_compiler", lambda: None),
        (api, "_interpreting", lambda: True),  # accept backend="triton" on the CPU
        (argument_checks, "values_are_checked", lambda tensor: argument_checks.debug_enabled()),  # as on a GPU
        (driver, "_active", dry.driver()),
        (ready, "repeat", repeat),
        (ready, "on_gpu", lambda tensor: True),
        (ready, "place", lambda: dry.number),
        (ops, "run", run),
        (verdict, "guarded", lambda device: checks),
    ]
    if checks:
        called = f"dry sm_{10 * capability[0] + capability[1]}"
        replaced += [
            (ops, "check_gpu", lambda device: None),
            (verdict_file, "identity", lambda device: verdict_file.versions(called, capability)),
        ]
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    with contextlib.ExitStack() as stack:
        verdict.forget()  # what was found of the CPU's tensors, then and now, is another GPU's
        stack.callback(verdict.forget)
        stack.callback(library._destroy)
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        for name in ops._SCHEMAS:
            library.impl(name, ops._implementation("triton", name), "CPU")
        stack.enter_context(_knob(knobs.compilation, "listener", compiled))
        stack.enter_context(_knob(knobs.runtime, "add_stages_inspection_hook", None if generates else _without_code))
        dry.clear()
        yield dry

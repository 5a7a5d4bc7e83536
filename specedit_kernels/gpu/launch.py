"""What every launch needs: the GPU's capability, its launch parameters, and the widest vectors that alignment allows.

Launch parameters are JSON files in `configs/`: one per measured GPU, named after it, and a default per architecture. A
file lists entries `{"shape": {...}, "config": {...}}` for each kernel. The entry of the nearest shape is used: element
type counts before head dim, head dim before length. Nothing is tuned at run time; `python -m specedit_kernels.tune`
writes such a file.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import subprocess
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

Config: TypeAlias = dict[str, int]  # launch parameters of one kernel

CONFIG_FOLDER = Path(__file__).parent / "configs"
MINIMUM_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__.removesuffix(".gpu.launch"))  # the package may be published under another name


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(device: torch.device) -> None:
    """Raises on a device that the kernels cannot run on, before the driver fails for lack of a kernel image.

    Raises:
        ValueError: not a CUDA device.
        RuntimeError: the GPU is older than compute capability 8.0.
    """
    if device.type == "cpu" and interpreting():
        return
    if device.type != "cuda":
        raise ValueError(f"expected CUDA tensors, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        wanted, got = (".".join(map(str, c)) for c in (MINIMUM_CAPABILITY, capability))
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f'expected a GPU of compute capability {wanted} or newer, got {got} ({name}); use backend="torch", '
            'in specedit.install attention="torch"'
        )


def check_compiler() -> None:
    """Starts Triton's driver, which is compiled on first use, and raises RuntimeError if that fails."""
    from triton.runtime import driver

    try:
        driver.active  # noqa: B018 - the attribute is created on first access
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"expected a C compiler and Python's headers, with which Triton builds its launchers, got: {error}; "
            'use backend="torch", in specedit.install attention="torch"'
        ) from error


def _interpreter_is_exact() -> bool:
    """Whether the interpreter computes with bfloat16 rather than with its bits, as it does where tests patch it."""
    from triton.runtime import interpreter

    return bool(getattr(interpreter.InterpreterBuilder, "exact_bfloat16", False))


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 4 in the interpreter, where small launches then have several rounds."""
    if interpreting():
        return 4
    from triton.runtime import driver

    index = device.index if device.index is not None else driver.active.get_current_device()
    return int(driver.active.utils.get_device_properties(index)["multiprocessor_count"])


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise TypeError(f'{name}: expected float16, bfloat16 or float32 on a GPU, got float64; use backend="torch"')
    if tensor.dtype == torch.bfloat16 and interpreting() and not _interpreter_is_exact():
        raise TypeError(
            f"{name}: expected float16 or float32 in Triton's interpreter, got bfloat16, which it gets wrong"
        )


def config_file_name(gpu_name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia_h100_80gb_hbm3.json'."""
    return "_".join("".join(c if c.isalnum() else " " for c in gpu_name.lower()).split()) + ".json"


def default_file_name(capability: tuple[int, int]) -> str:
    """The default of the newest architecture that the GPU supports. sm_120 takes sm_80's, having as little memory."""
    major = capability[0]
    return "default_sm_100.json" if major in (10, 11) else "default_sm_90.json" if major == 9 else "default_sm_80.json"


@functools.cache
def _read(file_name: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((CONFIG_FOLDER / file_name).read_text()))


@functools.cache
def _file_of(gpu_name: str, capability: tuple[int, int]) -> str:
    own = config_file_name(gpu_name)
    if (CONFIG_FOLDER / own).exists():
        return own
    fallback = default_file_name(capability)
    _log.info("no tuned launch parameters for %s; using %s", gpu_name, fallback)
    return fallback


@functools.cache
def file_of(device: torch.device) -> str:
    """Name of the device's file of launch parameters; sm_80's default for the interpreter."""
    if device.type != "cuda":
        return default_file_name((8, 0))
    return _file_of(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def nearest(entries: list[dict[str, Any]], shape: dict[str, int]) -> Config | None:
    """The `config` of the entry with the nearest shape, by absolute log ratios.

    Sizes are compared in the order of `shape`, and the first that differs decides. So a length never outweighs a head
    dim, whose tiles may not fit into shared memory for another one.
    """

    def distance(entry: dict[str, Any]) -> list[float]:
        sizes = entry["shape"]
        return [abs(math.log(max(1, shape[key]) / max(1, sizes[key]))) for key in shape if key in sizes]

    return cast("Config | None", min(entries, key=distance)["config"])


def config(kernel: str, device: torch.device, tuned: dict[str, Config] | None, **shape: int) -> Config | None:
    """Launch parameters of a kernel for a shape on this device.

    None if the device's file does not list the kernel, or lists null for shapes at which another kernel is faster.
    `tuned` maps kernels to parameters and overrides the files, for tuning and tests.
    """
    if tuned is not None:
        return tuned.get(kernel)
    return _entry(file_of(device), kernel, tuple(shape.items()))


@functools.lru_cache(4096)
def _entry(file_name: str, kernel: str, shape: tuple[tuple[str, int], ...]) -> Config | None:
    """The nearest entry, looked up once a shape: a call cannot afford to compare logarithms."""
    table = _read(file_name)
    return nearest(table[kernel], dict(shape)) if kernel in table else None


def entries(kernel: str, device: torch.device) -> list[dict[str, Any]]:
    """The entries of the device's file that name parameters of a kernel."""
    return [entry for entry in _read(file_of(device)).get(kernel, []) if entry["config"] is not None]


def shipped_config(kernel: str, device: torch.device, tuned: dict[str, Config] | None, **shape: int) -> Config:
    """`config` of a kernel that every device has."""
    if (found := config(kernel, device, tuned, **shape)) is None:
        raise LookupError(f"{kernel}: expected launch parameters for {shape}, found none")
    return found


def vector_width(itemsize: int, pointers: list[torch.Tensor], sizes: list[int]) -> int:
    """The most elements, up to 16 bytes, that divide all sizes and strides (in elements) and align all addresses."""
    width = max(1, 16 // itemsize)
    while width > 1:
        aligned = all(tensor.data_ptr() % (width * itemsize) == 0 for tensor in pointers)
        if aligned and all(size % width == 0 for size in sizes):
            break
        width //= 2
    return width


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()

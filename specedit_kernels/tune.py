"""Measure launch parameters on this machine's GPU, and write the file that later runs read.

    python -m specedit_kernels.tune [--out FILE] [--quick]

Each kernel is timed at a few real shapes over a small set of candidates (device time, median of repeats, L2
flushed between them); a candidate that does not compile or whose result differs from the plain PyTorch one is dropped.
The default place of the file is the package's own `gpu/configs/`, named after the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from . import reference

Config: TypeAlias = dict[str, int]  # launch parameters
Shape: TypeAlias = dict[str, int]
Tables: TypeAlias = dict[str, list[dict[str, Any]]]  # kernel to entries {"shape": ..., "config": ...}
PINGPONG = "attention_pingpong"
ATTENTION = ("attention", "attention_tma")  # without descriptors, and with
RIVAL = {PINGPONG: "attention_tma"}  # a kernel that is used where it is faster than another


def candidates(kernel: str, shape: Shape) -> Iterator[Config]:
    """Candidate launch parameters for a kernel at a shape."""
    if kernel in ATTENTION:
        if shape["bits"] == 32:
            blocks = [(16, 16), (32, 16)]
        elif shape["head_dim"] > 128:
            blocks = [(32, 32), (64, 32), (64, 64), (128, 64)]
        else:
            blocks = [(64, 32), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128)]
        for (m, n), warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4)):
            config = {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages}
            yield config
            if shape["bits"] == 16 and shape["head_dim"] <= 128:
                yield config | {"masked_tail": 1}  # one loop instead of a main loop and a tail
    elif kernel == PINGPONG:
        # Half of block_m is a warpgroup's. Other tiles spill, or need more shared memory than there is.
        tiles = [(128, 128, 3)] if shape["head_dim"] > 64 else [(256, 64, 4), (128, 128, 4)]
        for m, n, most in [(128, 64, 4), *tiles]:
            for stages in range(2, most + 1):
                yield {"block_m": m, "block_n": n, "num_stages": stages}
    elif kernel == "copy_rows":
        for tile, warps in itertools.product((4096, 8192, 16384), (4, 8)):
            yield {"tile_bytes": tile, "block_bytes": 4096, "num_warps": warps}
    elif kernel in ("expand", "contract"):
        for pixels, warps in itertools.product((256, 512, 1024), (2, 4, 8)):
            yield {"tile_pixels": pixels, "num_warps": warps}
    elif kernel == "weighted_sum":
        for block, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
            yield {"block": block, "num_warps": warps}
    elif kernel == "norm_rope":
        for rows, warps in itertools.product((8, 16, 32, 64), (4, 8)):
            yield {"block_rows": rows, "num_warps": warps}


def shapes(capability: tuple[int, int], quick: bool) -> Iterator[tuple[str, Shape]]:
    """Kernels and shapes to tune: FLUX and Qwen-Image token counts, both common head dims."""
    lengths = (2560,) if quick else (1024, 2560, 8704)
    tables = ["attention"] + (["attention_tma"] if capability >= (9, 0) and capability[0] < 12 else [])
    for table, dim, keys in itertools.product(tables, (64, 128), lengths):
        yield table, {"head_dim": dim, "bits": 16, "keys": keys}
    for table in tables:
        yield table, {"head_dim": 256, "bits": 16, "keys": 2560}
    for dim in (64, 128):
        yield "attention", {"head_dim": dim, "bits": 32, "keys": 1024}
    for row_bytes in (128, 6144):
        yield "copy_rows", {"row_bytes": row_bytes}
    yield "expand", {"channels": 16}
    yield "contract", {"channels": 16}
    yield "weighted_sum", {"rows": 3}
    for dim in (64, 128, 256):
        yield "norm_rope", {"head_dim": dim}
    if capability == (9, 0):
        for dim, keys in itertools.product((64, 128), lengths):
            yield PINGPONG, {"head_dim": dim, "bits": 16, "keys": keys}


def workload(
    kernel: str, shape: Shape, device: str, half: torch.dtype = torch.bfloat16, rows: int = 65536
) -> tuple[Callable[[Config], torch.Tensor], torch.Tensor]:
    """A function from launch parameters to the kernel's result at a shape, and the expected result."""
    from . import gpu

    g = torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).to(dtype)

    def run(name: str, *arguments: Any) -> Callable[[Config], Any]:
        return lambda config: gpu.run(name, arguments, {kernel: config})

    if kernel.startswith("attention"):
        dtype = half if shape["bits"] == 16 else torch.float32
        heads = max(1, 3072 // shape["head_dim"])
        lengths = shape.get("queries", shape["keys"]), shape["keys"], shape["keys"]
        q, k, v = (randn(1, n, heads, shape["head_dim"], dtype=dtype) for n in lengths)
        bias = randn(1, shape["keys"], dtype=torch.float32)
        attend = run("mixed_attention", q, k, v, None, None, None, bias, shape["head_dim"] ** -0.5, False)
        # With its log-sum-exp it is computed in float32.
        want, _ = reference.mixed_attention(q, k, v, key_bias=bias, return_lse=True)
        return lambda config: attend(config)[0], want
    if kernel == "copy_rows":
        x = randn(rows, shape["row_bytes"] // 2)
        index = torch.randperm(rows, generator=g, device=device)
        return run("gather_tokens", x, index), x[index]
    if kernel == "expand":
        z, noise = randn(rows, 4 * shape["channels"]), randn(rows, 4, shape["channels"], 3)
        return run("expand_tokens", z, 0.5, noise, None, None), reference.expand_tokens(z, 0.5, noise=noise)[0]
    if kernel == "contract":
        f = randn(rows, 4, 4 * shape["channels"])
        return run("contract_tokens", f, 0.5), reference.contract_tokens(f, 0.5)[0]
    if kernel == "weighted_sum":
        layers, weights = randn(shape["rows"], rows, 64), randn(shape["rows"], dtype=torch.float32)
        return run("weighted_sum", layers, weights), reference.weighted_sum(layers, weights)
    tokens = rows // 8
    q, k = (randn(tokens, max(1, 3072 // shape["head_dim"]), shape["head_dim"]) for _ in range(2))
    weight, angle = randn(shape["head_dim"]), randn(tokens, shape["head_dim"] // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    out, other = torch.empty_like(q), torch.empty_like(k)
    norm_rope = run("qk_norm_rope", q, k, None, weight, weight, cos, sin, 1e-6, None, out, other, None)
    return lambda config: norm_rope(config) or out, reference.qk_norm_rope(q, k, weight, weight, cos, sin)[0]


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of a call with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times[3:]))


Timer: TypeAlias = Callable[[Callable[[], object]], float]


def best(
    kernel: str,
    call: Callable[[Config], torch.Tensor],
    want: torch.Tensor,
    configs: Iterable[Config],
    timer: Timer,
) -> tuple[float, Config] | None:
    """Milliseconds and parameters of the fastest of `configs` whose `call(config)` gives `want`, or None."""
    tolerance = 4 * torch.finfo(want.dtype).eps * want.abs().max().item()
    found: tuple[float, Config] | None = None
    for config in configs:
        try:
            if not (call(config) - want).abs().max().item() <= tolerance:
                continue
            time = timer(partial(call, config))
        except Exception as error:  # out of resources, or a compiler error: not a candidate on this GPU
            print(f"  {kernel} {config}: {type(error).__name__}", file=sys.stderr)
            continue
        if found is None or time < found[0]:
            found = (time, config)
    return found


def split(kernel: str, shape: Shape, config: Config, device: str, timer: Timer) -> Config:
    """`config`, with how many programs run at once on a processor where splitting a short last round by it is faster.

    Both are timed on the queries whose last round is the most worth it, between 1,024 and 2,048. Other kernels and
    shapes are not split.
    """
    from .gpu import launch
    from .gpu.attention_split import LARGEST_DIM, saved

    if kernel not in ATTENTION or shape["bits"] != 16 or shape["head_dim"] > LARGEST_DIM:
        return config
    heads, blocks = max(1, 3072 // shape["head_dim"]), shape["keys"] // config["block_n"]
    fastest, gain = config, 1.0
    for resident in (1, 2):
        slots = resident * launch.processors(torch.device(device))

        def share(queries: int, slots: int = slots) -> float:
            return saved(heads * launch.ceil_div(queries, config["block_m"]), slots, blocks)

        queries = max(range(1024, 2049, config["block_m"]), key=share)
        if not share(queries):
            continue
        call, want = workload(kernel, shape | {"queries": queries}, device)
        other = config | {"resident": resident}
        found = [best(kernel, call, want, [one], timer) for one in (config, other)]
        times = [math.inf if one is None else one[0] for one in found]
        if times[1] < gain * times[0]:
            fastest, gain = other, times[1] / times[0]
    return fastest


def tune(
    capability: tuple[int, int], device: str, timer: Timer, quick: bool, save: Callable[[Tables], None]
) -> Tables:  # fmt: skip
    """Tables of measured entries, in the format of `gpu/configs/`; null where a kernel is not faster than its rival.

    What there is so far is saved before a kernel whose warps wait for one another, since that might never end.
    """
    tables: Tables = {}
    times: dict[tuple[str, str], float] = {}
    for kernel, shape in shapes(capability, quick):
        if kernel in RIVAL and kernel not in tables:
            save(tables)
        found = best(kernel, *workload(kernel, shape, device), candidates(kernel, shape), timer)
        print(kernel, shape, found, flush=True)
        if found is not None:
            times[kernel, str(shape)] = found[0]
            found = found[0], split(kernel, shape, found[1], device, timer)
        rival = times.get((RIVAL.get(kernel, ""), str(shape)), math.inf)
        if kernel in RIVAL or found is not None:
            config = found[1] if found is not None and found[0] < rival else None
            tables.setdefault(kernel, []).append({"shape": shape, "config": config})
    return tables


def complete(tables: Tables, default: Tables) -> None:
    """Add the architecture's default entries for kernels, head dims and element types without a measured one.

    Otherwise an entry for another head dim would be the nearest, and its tiles may not fit.
    """

    def kind(entry: dict[str, Any]) -> tuple[int | None, int | None]:
        return entry["shape"].get("head_dim"), entry["shape"].get("bits")

    for kernel, entries in default.items():
        measured = tables.setdefault(kernel, [])
        kinds = {kind(entry) for entry in measured}
        measured += [entry for entry in entries if kind(entry) not in kinds]


def write(path: Path, header: dict[str, Any], tables: Tables) -> None:
    """One entry per line, so that diffs are readable."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    for kernel, entries in tables.items():
        rows = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        lines.append(f"  {json.dumps(kernel)}: [\n{rows}\n  ]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specedit_kernels.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="file to write (default: the package's file for this GPU)")
    parser.add_argument("--quick", action="store_true", help="one sequence length instead of three")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("specedit_kernels.tune: expected a CUDA GPU to measure on, found none", file=sys.stderr)
        return 2
    from .gpu import launch

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    path = options.out or launch.CONFIG_FOLDER / launch.config_file_name(name)
    default = json.loads((launch.CONFIG_FOLDER / launch.default_file_name(capability)).read_text())
    for words in ("gpu", "capability", "measured"):
        del default[words]
    header = {"gpu": name, "capability": list(capability), "measured": True, "torch": torch.__version__}

    def save(tables: Tables) -> None:
        completed = {kernel: list(entries) for kernel, entries in tables.items()}
        complete(completed, default)
        write(path, header, completed)

    save(tune(capability, "cuda", milliseconds, options.quick, save))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

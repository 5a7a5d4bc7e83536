"""Compile every shipped kernel in every shipped configuration, without a GPU.

    python -m specedit_kernels.compile_check [--arch sm_80 sm_90 sm_100] [--json FILE] [--jobs N]
                                            [--pairwise | --pairwise-archs] [--only REGEX]

Prints registers, spilled bytes, shared memory and matrix instructions of each, read from the cubin with the cuobjdump
that comes with Triton. Exits with 1 if anything fails to compile, spills, needs more shared memory than the
architecture has, should use the tensor cores and does not, or waits for each wgmma before the next. Another Triton than
the installed one is checked by putting its folder first: `pip install --target DIR --no-deps triton==3.6.0`, then the
same command with PYTHONPATH=DIR. The JSON also has the instructions that each main loop issues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from . import sass
from .compile_variants import Variant, source, variants

# Shared memory one block may use, in bytes (CUDA programming guide, compute capabilities).
_SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
# The matrix instruction, as cuobjdump prints it; sm_100's tcgen05.mma is UTC*MMA.
_MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 103: r"UTC\w*MMA", 120: "HMMA"}


@dataclass
class Result:
    arch: str
    name: str
    config_file: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    matrix_instructions: int = 0
    main_loop: dict[str, int] = field(default_factory=dict)  # instructions of each class, see `sass.Code.main_loop`
    problems: list[str] = field(default_factory=list)


def check(variant: Variant, capability: int, config_file: str) -> Result:
    """Compile and judge one variant for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget

    limit = _SHARED_LIMIT[capability]
    result = Result(f"sm_{capability}", variant.name, config_file, shared_limit=limit)
    try:
        compiled = triton.compile(
            source(variant), target=GPUTarget("cuda", capability, 32), options=dict(variant.options)
        )
    except Exception as error:  # any compiler error is this variant's result
        result.problems.append(f"does not compile: {type(error).__name__}: {error}")
        return result
    code = sass.read(compiled.asm["cubin"], listing=variant.matrix)
    result.registers, result.spills = code.registers, code.spills
    result.matrix_instructions = code.count(_MATRIX[capability])
    result.main_loop = dict(code.main_loop())
    result.shared = compiled.metadata.shared
    if result.spills:
        result.problems.append("spills registers")
    if result.shared > limit:
        result.problems.append(f"needs {result.shared} bytes of shared memory, limit {limit}")
    if variant.matrix and not result.matrix_instructions:
        result.problems.append(f"no {_MATRIX[capability]} instruction")
    if code.serialized:
        result.problems.append("wgmma instructions are serialised")
    return result


def shipped(capability: int) -> list[tuple[str, Variant]]:
    """Variants of an architecture's default configurations and of every measured GPU's, each with its file's name."""
    from .gpu import launch

    default = launch.default_file_name((capability // 10, capability % 10))
    found: dict[tuple[str, ...], tuple[str, Variant]] = {}
    for path in sorted(launch.CONFIG_FOLDER.glob("*.json")):
        table = json.loads(path.read_text())
        tuned = not path.name.startswith("default_") and table["capability"] == [capability // 10, capability % 10]
        if path.name == default or tuned:
            for variant in variants(table):
                key = (path.name, variant.name, str(variant.constants), str(variant.options))
                found.setdefault(key, (path.name, variant))
    return list(found.values())


def _pairs(capability: int, variant: Variant) -> set[tuple[Any, ...]]:
    """Every two of the settings, apart from sizes and types, that decide which code of a kernel is compiled."""
    settings: dict[str, Any] = {
        n: v for n, v in variant.constants.items() if isinstance(v, (bool, str, type(None))) or n == "PATCH"
    }
    settings |= {"grouped": variant.grouped, "aligned": variant.aligned, "arch": capability}
    kernel = variant.kernel.fn.__name__
    return {(kernel, *pair) for pair in itertools.combinations(sorted(settings.items()), 2)}


def _pairwise(capabilities: list[int]) -> list[tuple[int, int]]:
    """(capability, number) of `shipped`: few variants that have every pair of settings.

    The first of each kernel on an architecture has the widest heads, the largest tile and most switches on, where
    registers run out first. The others are the narrowest that add as many pairs, which compile fastest.
    """
    variants = {(c, number): variant for c in capabilities for number, (_, variant) in enumerate(shipped(c))}
    pairs = {task: _pairs(task[0], variant) for task, variant in variants.items()}
    kernels = {task: (task[0], variant.kernel.fn.__name__) for task, variant in variants.items()}
    missing, chosen = set[tuple[Any, ...]]().union(*pairs.values()), list[tuple[int, int]]()

    def rank(task: tuple[int, int]) -> tuple[int, ...]:
        if kernels[task] in known:
            return 0, 0, len(pairs[task] & missing), -task[1]
        sizes = variants[task].constants
        tile, switches_on = sizes.get("BLOCK_M", 0) * sizes.get("BLOCK_N", 0), sum(x is True for x in sizes.values())
        return sizes.get("DIM_P2", 0), tile, switches_on, -task[1]

    while missing:
        known = {kernels[task] for task in chosen}
        best = max((task for task in pairs if pairs[task] & missing), key=rank)
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def _check_shipped(task: tuple[int, int]) -> Result:
    """Check one of `shipped`, given as (capability, number) because kernels cannot be pickled."""
    capability, number = task
    config_file, variant = shipped(capability)[number]
    return check(variant, capability, config_file)


def check_shipped(tasks: list[tuple[int, int]], jobs: int) -> Iterator[Result]:
    """Check (capability, number) of `shipped` in `jobs` processes; results are in the order of the tasks."""
    if jobs == 1:
        yield from map(_check_shipped, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_check_shipped, tasks)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specedit_kernels.compile_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"],
                        choices=[f"sm_{c}" for c in _SHARED_LIMIT])  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--jobs", type=int, metavar="N", default=min(8, os.cpu_count() or 1),
                        help="processes that compile side by side (default: one per core, at most 8)")  # fmt: skip
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--pairwise", action="store_true",
                     help="few variants: every pair of a kernel's switches on each architecture")  # fmt: skip
    few.add_argument("--pairwise-archs", action="store_true",
                     help="fewer: every pair on some architecture, every switch on each")  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", default="", help="only variants whose name matches")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    import triton

    results = []
    print(f"Triton {triton.__version__} from {os.path.dirname(triton.__file__)}")
    print(f"{'arch':7} {'kernel':38} {'regs':>4} {'spill':>5} {'shared':>7} {'matrix':>6}")
    capabilities = [int(arch.removeprefix("sm_")) for arch in options.arch]
    names = {c: [variant.name for _, variant in shipped(c)] for c in capabilities}
    if options.pairwise or options.pairwise_archs:
        together = [capabilities] if options.pairwise_archs else [[c] for c in capabilities]
        tasks = [task for group in together for task in _pairwise(group)]
    else:
        tasks = [(c, number) for c in capabilities for number in range(len(names[c]))]
    tasks = [(c, number) for c, number in tasks if re.search(options.only, names[c][number])]
    if not tasks:
        parser.error(f"--only: expected part of a variant's name, got {options.only!r}")
    for result in check_shipped(tasks, options.jobs):
        results.append(result)
        verdict = "; ".join(result.problems)
        print(f"{result.arch:7} {result.name:38} {result.registers:4} {result.spills:5} {result.shared:7} "
              f"{result.matrix_instructions:6}  {verdict}".rstrip(), flush=True)  # fmt: skip
    bad = sum(bool(result.problems) for result in results)
    print(f"{len(results)} variants, {bad} with problems")
    if options.json:
        import torch

        machine = {"torch": torch.__version__, "triton": triton.__version__}
        with open(options.json, "w") as file:
            words = shlex.join(sys.argv[1:] if arguments is None else arguments)
            command = f"python -m specedit_kernels.compile_check {words}"
            rows = [asdict(result) for result in results]
            json.dump({"machine": machine, "command": command, "rows": rows}, file, indent=1)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

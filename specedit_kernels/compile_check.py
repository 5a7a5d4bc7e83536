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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import sass

# Shared memory one block may use, in bytes (CUDA programming guide, compute capabilities).
_SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
# The matrix instruction, as cuobjdump prints it; sm_100's tcgen05.mma is UTC*MMA.
_MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 103: r"UTC\w*MMA", 120: "HMMA"}
_STRIDES = ("_sample", "_token", "_row", "_head", "_child")
_ORDER = ("key_order", "key_counts", "tile_bias")  # of keys whose blocks share a bias
_PARTS = ("sums", "statistics", "split_from", "parts")  # of query blocks whose keys are split
_LISTS = ("block_offsets", "blocks", "list_rows", "listed", "list_sample", "list_head")  # of key blocks, when there are
_LAST_STRIDES = ("_dim", "_channel", "bias_key")


@dataclass
class Variant:
    """One kernel with everything that determines its machine code."""

    name: str
    kernel: Any  # a function under triton.jit
    pointers: dict[str, str]  # argument -> element type, or a descriptor's type
    constants: Mapping[str, Any]
    options: dict[str, int]
    floats: tuple[str, ...] = ()
    matrix: bool = False
    grouped: bool = False  # several query heads per key head
    aligned: tuple[str, ...] = ()  # sizes that are multiples of 16 in this launch


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


def _attention(table: dict[str, Any]) -> Iterator[Variant]:
    from .gpu.attention import attend
    from .gpu.attention_order import order_keys
    from .gpu.attention_plan import plan_tiles
    from .gpu.attention_split import JOINED_ROWS, LARGEST_DIM, join_parts

    everything = {"PACKED": True, "PLANNED": True, "HAS_BIAS": True, "SCALE_FIRST": True, "HAS_LSE": True}
    nothing = dict.fromkeys(everything, False) | dict.fromkeys(("bias", "lse", "cu_q", "cu_k", "plan"))
    lengths = {"cu_q": "i32", "cu_k": "i32", "plan": "i32"}
    unlisted = {
        "LISTED": False,
        "QUERY_BLOCK": 0,
        "KEY_BLOCK": 0,
        "ORDERED": False,
        "MASKED_TAIL": False,
        "SPLIT": False,
    } | dict.fromkeys((*_LISTS, *_ORDER, *_PARTS))
    entries = [(True, entry) for entry in table.get("attention_tma", [])]
    for with_descriptors, entry in entries + [(False, entry) for entry in table["attention"]]:
        config, width = entry["config"], entry["shape"]["head_dim"]
        blocks = {"BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"]}
        options = {key: config[key] for key in ("num_warps", "num_stages")}
        half = entry["shape"]["bits"] == 16
        blocks["PRECISION"] = "tf32" if half else "ieee"
        # Both half types are shipped, and head dims below the padded one.
        ways = [("bf16", width), ("bf16", width * 3 // 4), ("fp16", width)] if half else [("fp32", width)]
        if width == 64:  # smaller head dims use this entry too
            ways += [("bf16" if half else "fp32", dim) for dim in (16, 32)]
        for element, dim in ways:
            padded = min(width, 1 << (dim - 1).bit_length())
            pointers = dict.fromkeys(("q", "k", "v", "out"), element) | {"bias": "fp32", "lse": "fp32"}
            descriptors = {
                f"{name}_desc": f"tensordesc<{element}[1, 1, {rows}, {padded}]>"
                for name, rows in (("q", config["block_m"]), ("k", config["block_n"]), ("v", config["block_n"]))
            }
            fixed = blocks | unlisted | {"DIM": dim, "DIM_P2": padded, "DESCRIPTORS": with_descriptors}
            if with_descriptors:
                pointers |= descriptors
            else:
                fixed |= dict.fromkeys(descriptors)
            label = f"attend {element} D{dim} {'tma' if with_descriptors else 'ptr'}"
            packed = Variant(f"{label} packed bias lse", attend, pointers | lengths, fixed | everything, options,
                             ("scale_log2",), half)  # fmt: skip
            yield packed
            yield _ordered(packed)
            if dim == width and element != "fp16":
                dense = Variant(f"{label} dense", attend, pointers, fixed | nothing, options, ("scale_log2",), half)
                yield dense
                if half:  # a candidate of the tuner
                    yield replace(
                        dense, name=f"{dense.name} masked tail", constants={**dense.constants, "MASKED_TAIL": True}
                    )
                if half and dim <= LARGEST_DIM:
                    yield _split(_ordered(replace(packed, constants={**packed.constants, "PLANNED": False})))
                    sizes = {"DIM": dim, "DIM_P2": padded, "BLOCK_M": config["block_m"], "ROWS": JOINED_ROWS}
                    floats = dict.fromkeys(("sums", "statistics", "lse"), "fp32") | {"cu_q": "i32", "out": element}
                    yield Variant(f"join_parts {element} D{dim}", join_parts, floats,
                                  sizes | {"PACKED": True, "HAS_LSE": True}, {"num_warps": 4})  # fmt: skip
                yield from (*_listed(packed), *_listed(dense))
                yield Variant(f"{label} packed bias lse gqa", attend, pointers | lengths, fixed | everything, options,
                              ("scale_log2",), half, grouped=True)  # fmt: skip
        blocks = {"BLOCK_M": config["block_m"], "BLOCK_B": 128, "BLOCK_T": 128}
        fixed = {"PACKED": True, "BLOCK_N": config["block_n"], "BLOCK_T": 16}
        order = {"bias": "fp32", "cu_k": "i32", "key_order": "i32", "key_counts": "i32", "tile_bias": "fp32"}
        yield Variant(f"order_keys {config['block_n']}", order_keys, order, fixed, {"num_warps": 4})
        yield Variant(f"plan_tiles {config['block_m']}", plan_tiles, lengths, blocks, {"num_warps": 4})


def _pingpong(table: dict[str, Any]) -> Iterator[Variant]:
    """The ping-pong kernel: entries of a table, and for sm_90 all that the tuner may choose."""
    from .gpu.attention_pingpong import attend_pingpong, tile_layout
    from .tune import PINGPONG, candidates

    entries = [(entry["shape"]["head_dim"], entry["config"]) for entry in table.get(PINGPONG, [])]
    if table["capability"] == [9, 0] and not table["measured"]:
        entries += [(dim, config) for dim in (64, 128) for config in candidates(PINGPONG, {"head_dim": dim})]
    flags = ("PACKED", "PLANNED", "HAS_BIAS", "SCALE_FIRST", "HAS_LSE")
    absent: dict[str, Any] = dict.fromkeys(flags, False) | dict.fromkeys(("bias", "lse", "cu_q", "cu_k", "plan"))
    unordered = {"ORDERED": False} | dict.fromkeys(_ORDER)
    lengths = {"cu_q": "i32", "cu_k": "i32", "plan": "i32", "bias": "fp32", "lse": "fp32"}
    for dim, config in entries:
        if config is None:
            continue
        m, n, stages = config["block_m"], config["block_n"], config["num_stages"]
        fixed = unordered | {"DIM": dim, "DIM_P2": dim, "BLOCK_M": m, "BLOCK_N": n, "STAGES": stages}
        for element in ("bf16", "fp16"):
            rows = (("q", m // 2), ("k", n), ("v", n))
            pointers = {
                f"{name}_desc": f"tensordesc<{element}[1, 1, {count}, {dim}],{tile_layout(dim)!r}>"
                for name, count in rows
            } | {"v": element, "out": element}  # fmt: skip
            label = f"attend {element} D{dim} pingpong {m}x{n}x{stages}"
            packed = Variant(f"{label} packed bias lse", attend_pingpong, pointers | lengths,
                             fixed | dict.fromkeys(flags, True), {"num_warps": 4}, ("scale_log2",), True)  # fmt: skip
            if element == "fp16" and stages > 2:
                continue
            if element == "fp16":
                yield replace(packed, name=f"{packed.name} gqa", grouped=True)
                continue
            yield Variant(f"{label} dense", attend_pingpong, pointers, fixed | absent, {"num_warps": 4},
                          ("scale_log2",), True)  # fmt: skip
            yield packed
            yield _ordered(packed)


def _given(
    variant: Variant, label: str, arguments: tuple[str, ...], pointers: dict[str, str], **constants: Any
) -> Variant:  # fmt: skip
    """A configuration in which arguments that were absent are given, some of them pointers."""
    kept = {name: value for name, value in variant.constants.items() if name not in arguments}
    return replace(variant, name=f"{variant.name} {label}", pointers=variant.pointers | pointers,
                   constants=kept | constants)  # fmt: skip


def _ordered(variant: Variant) -> Variant:
    """A configuration with a plan that lists the blocks of keys that share a bias."""
    pointers = {"key_order": "i32", "key_counts": "i32", "tile_bias": "fp32"}
    return _given(variant, "planned", _ORDER, pointers, ORDERED=True)


def _split(variant: Variant) -> Variant:
    """A configuration whose last round of programs is split along the keys."""
    return _given(variant, "split", _PARTS, {"sums": "fp32", "statistics": "fp32"}, SPLIT=True)


def _listed(variant: Variant) -> Iterator[Variant]:
    """A configuration with lists of key blocks, once for every tile that their sizes lead to."""
    from .gpu.attention_blocks import tile_of

    seen = set()
    for sizes in ((128, 128), (128, 64), (64, 64)):
        m, n = tile_of(sizes, variant.constants["BLOCK_M"], variant.constants["BLOCK_N"])
        if (m, n) in seen:
            continue
        seen.add((m, n))
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "QUERY_BLOCK": sizes[0], "KEY_BLOCK": sizes[1]}
        pointers = {name: re.sub(r"1, 1, \d+", f"1, 1, {m if name == 'q_desc' else n}", kind)
                    for name, kind in variant.pointers.items()}  # fmt: skip
        pointers |= {"block_offsets": "i32", "blocks": "i32"}
        yield _given(variant, f"lists {m}x{n}", _LISTS, pointers, **blocks, LISTED=True)


def _rows(table: dict[str, Any]) -> Iterator[Variant]:
    from .gpu.rows import copy_rows, tile

    for entry in table["copy_rows"]:
        config = entry["config"]
        for channels in (64, 3072):
            for scatter in (False, True):
                block_rows, block_channels = tile(config, channels, 2)
                constants = {"CHANNELS": channels, "VECTOR": 8, "SCATTER": scatter, "BLOCK_ROWS": block_rows,
                             "BLOCK_CHANNELS": block_channels}  # fmt: skip
                yield Variant(
                    f"copy_rows bf16 C{channels} {'scatter' if scatter else 'gather'}", copy_rows,
                    {"source": "bf16", "target": "bf16", "index": "i64"}, constants, {"num_warps": config["num_warps"]},
                )  # fmt: skip


def _expand(table: dict[str, Any]) -> Iterator[Variant]:
    """Packed tokens with the channels of each entry, and unpacked ones with as many numbers in a token."""
    from .gpu.expand import contract, expand, tiles

    def ways(kernel: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
        for entry in table[kernel]:
            channels = entry["shape"]["channels"]
            for patch, width, label in ((2, channels, ""), (1, 4 * channels, " unpacked")):
                constants = tiles(entry["config"], width, patch)
                yield constants, {"num_warps": constants.pop("num_warps")}, label

    for element in ("bf16", "fp32"):
        for constants, options, label in ways("expand"):
            for noise in (True, False):
                flags = {"HAS_NOISE": noise, "HAS_DETAIL": True, "SEED_PER_SAMPLE": not noise}
                pointers = {"coarse": element, "fine": element, "detail": element}
                pointers |= {"noise": "fp32"} if noise else {"seed": "i64"}
                absent = {"seed": None} if noise else {"noise": None}
                yield Variant(
                    f"expand {element} {'noise given' if noise else 'philox'}{label}", expand, pointers,
                    constants | flags | absent, options, ("signal", "noise_level", "detail_level"),
                )  # fmt: skip
        for constants, options, label in ways("contract"):
            yield Variant(f"contract {element}{label}", contract, {"coarse": element, "fine": element}, constants,
                          options, ("factor",))  # fmt: skip


def _norm_rope(table: dict[str, Any]) -> Iterator[Variant]:
    from .gpu.norm_rope import norm_rope

    for element in ("bf16", "fp32"):
        for entry in table["norm_rope"]:
            config, dim = entry["config"], entry["shape"]["head_dim"]
            pointers = dict.fromkeys(("q", "k", "v", "q_weight", "k_weight", "q_out", "k_out", "v_out"), element)
            pointers |= {"cos": "fp32", "sin": "fp32", "out_index": "i64"}
            constants = {"HEADS": 24, "DIM": dim, "DIM_P2": dim, "BLOCK_ROWS": config["block_rows"], "INDEXED": True}
            for rescaled in (False, True):
                yield Variant(
                    f"norm_rope {element} D{dim}{' eps 0' if rescaled else ''}", norm_rope, pointers,
                    constants | {"RESCALED": rescaled}, {"num_warps": config["num_warps"]}, ("eps",),
                )  # fmt: skip


def _weighted_sum(table: dict[str, Any]) -> Iterator[Variant]:
    from .gpu.sums import weighted_sum

    for element in ("bf16", "fp32"):
        for entry in table.get("weighted_sum", []):
            rows, config = entry["shape"]["rows"], entry["config"]
            pointers = {"stack": element, "weights": "fp32", "out": element}
            constants = {"ROWS": rows, "BLOCK": config["block"]}
            for label, aligned in ((" any size", ()), ("", ("elements",))):  # a model's hidden size is a multiple
                yield Variant(f"weighted_sum {element} K{rows}{label}", weighted_sum, pointers, constants,
                              {"num_warps": config["num_warps"]}, aligned=aligned)  # fmt: skip


def variants(table: dict[str, Any]) -> Iterator[Variant]:
    """Every kernel of every configuration in a file."""
    for family in (_attention, _pingpong, _rows, _expand, _norm_rope, _weighted_sum):
        yield from family(table)


def _source(variant: Variant) -> Any:
    """The kernel with the argument types of a launch with contiguous, 16-byte aligned tensors."""
    from triton.compiler import ASTSource

    signature, constants, aligned = {}, dict(variant.constants), []
    for at, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            kind = variant.pointers[name]
            signature[name] = kind if kind.startswith("tensordesc") else f"*{kind}"
            if not (kind.startswith("tensordesc") or variant.kernel.params[at].do_not_specialize_on_alignment):
                aligned.append(at)
        elif name in variant.floats:
            signature[name] = "fp32"
        elif name.endswith(_LAST_STRIDES) or (name == "group" and not variant.grouped):  # launches specialise on 1
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            strides = name.endswith(_STRIDES) and not variant.kernel.params[at].do_not_specialize
            if strides or name in variant.aligned:
                aligned.append(at)
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    source: Any = ASTSource
    if variant.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    return source(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)


def check(variant: Variant, capability: int, config_file: str) -> Result:
    """Compile and judge one variant for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget

    limit = _SHARED_LIMIT[capability]
    result = Result(f"sm_{capability}", variant.name, config_file, shared_limit=limit)
    try:
        compiled = triton.compile(
            _source(variant), target=GPUTarget("cuda", capability, 32), options=dict(variant.options)
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

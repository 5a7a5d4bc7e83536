"""What `specedit_kernels.compile_check` compiles: every kernel of a file's configurations, typed as a launch does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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


def attention(table: dict[str, Any]) -> Iterator[Variant]:
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


def pingpong(table: dict[str, Any]) -> Iterator[Variant]:
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


def rows(table: dict[str, Any]) -> Iterator[Variant]:
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


def expand(table: dict[str, Any]) -> Iterator[Variant]:
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


def norm_rope(table: dict[str, Any]) -> Iterator[Variant]:
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


def weighted_sum(table: dict[str, Any]) -> Iterator[Variant]:
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
    for family in (attention, pingpong, rows, expand, norm_rope, weighted_sum):
        yield from family(table)


def source(variant: Variant) -> Any:
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

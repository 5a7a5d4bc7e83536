"""What a run would take on a GPU that is not at hand: operations, bytes and roofline seconds of every stage.

Nothing is run and nothing is measured. An operator (a matrix product, attention, a norm, ...) takes at least
max(operations / peak, bytes / bandwidth), where it reads its inputs and weights once and writes its output once
(the roofline model: Williams, Waterman and Patterson, CACM 52 (2009)); a stage takes the sum over its operators. That
is a bound from below for operators run one by one in bf16: kernels fall short of the peak, and launching them takes
time that no roofline knows. Encoding the prompt is left out, as embeddings may be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .config import SpecEditConfig, resolve
from .flops import MODELS, STOCK_STEPS, TOKEN_PIXELS, transformer_flops
from .flops import plan as plan_flops

BYTES = 2  # bf16
MATCHING = 0.03  # a measured edit counts as the planned one within this share of the cells


@dataclass(frozen=True)
class Gpu:
    """Published peak of dense bf16 matrix products (operations a second) and memory bandwidth (bytes a second)."""

    flops: float
    bandwidth: float
    source: str


# NVIDIA prints bf16 with 2:4 sparsity from Hopper on; half of that is the dense peak.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "A100": Gpu(312e12, 2.039e12, "NVIDIA A100 datasheet, SXM 80 GB"),
        "H100": Gpu(989e12, 3.35e12, "NVIDIA H100 datasheet, SXM"),
        "H200": Gpu(989e12, 4.8e12, "NVIDIA H200 datasheet, SXM"),
        "B200": Gpu(2250e12, 7.7e12, "NVIDIA Blackwell datasheet, HGX B200"),
    }
)


@dataclass(frozen=True)
class Op:
    """`count` equal operators; `flops` and `bytes` of each."""

    name: str
    flops: float
    bytes: float
    count: float = 1


@dataclass(frozen=True)
class HalfCost:
    """One half of an autoencoder, per latent pixel: `flops` of convolutions and projections, `elements` that its layers
    read and write, `weights` in all; `channels` of the attention in its middle, quadratic in latent pixels.

    Counted over the released configurations; tests/test_plan.py counts again.
    """

    flops: float
    elements: float
    weights: float
    channels: int


AUTOENCODERS: Mapping[str, Mapping[str, HalfCost]] = MappingProxyType(
    {
        "flux-kontext": {
            "encode": HalfCost(264_454_144, 459_024, 34_274_208, 512),
            "features": HalfCost(68_304_896, 46_608, 27_094_016, 512),
            "decode": HalfCost(605_618_176, 837_328, 49_545_475, 512),
        },
        "qwen-image-edit": {
            "encode": HalfCost(426_039_296, 401_256, 53_595_872, 384),
            "features": HalfCost(86_446_080, 38_416, 42_128_064, 384),
            "decode": HalfCost(687_882_752, 631_536, 73_295_331, 384),
        },
    }
)


def roofline(ops: Iterable[Op], gpu: Gpu) -> float:
    """Seconds of operators run one after another, each at its own bound."""
    return sum(op.count * max(op.flops / gpu.flops, op.bytes / gpu.bandwidth) for op in ops)


def transformer_ops(model: str, tokens: int, batch: int = 1) -> list[Op]:
    """Operators of one forward pass over `batch` sequences of `tokens` (text + target + reference) each.

    A double block has weights of its own for the text and the image stream, a single block one set for all. Their
    operations add up to `flops.transformer_flops`; what that leaves out has bytes here, but no operations.
    """
    cost = MODELS[model]
    double, single = cost.config["num_layers"], cost.config.get("num_single_layers", 0)
    d = cost.config["num_attention_heads"] * cost.config["attention_head_dim"]
    text, every = batch * cost.text_tokens, batch * tokens

    def product(name: str, rows: float, inner: int, outer: int, count: float) -> Op:
        elements = rows * (inner + outer) + inner * outer
        return Op(name, 2 * rows * inner * outer, BYTES * elements, count)

    def pointwise(name: str, elements: float, count: float) -> Op:
        return Op(name, 0, BYTES * elements, count)

    ops = []
    for rows in (text, every - text):
        ops += [
            pointwise("modulation", 6 * d * d, double),
            pointwise("norm", 2 * rows * d, 2 * double),
            product("qkv", rows, d, 3 * d, double),
            pointwise("qk norm and rotary", 4 * rows * d, double),
            product("projection", rows, d, d, double),
            product("mlp up", rows, d, 4 * d, double),
            pointwise("gelu", 8 * rows * d, double),
            product("mlp down", rows, 4 * d, d, double),
            pointwise("gate and add", 3 * rows * d, 2 * double),
        ]
    if single:
        ops += [
            pointwise("modulation", 3 * d * d, single),
            pointwise("norm", 2 * every * d, single),
            product("qkv", every, d, 3 * d, single),
            pointwise("qk norm and rotary", 4 * every * d, single),
            product("mlp up", every, d, 4 * d, single),
            pointwise("gelu", 8 * every * d, single),
            pointwise("cat", 10 * every * d, single),
            product("projection and mlp down", every, 5 * d, d, single),
            pointwise("gate and add", 3 * every * d, single),
        ]
    attention = Op("attention", batch * 4 * tokens**2 * d, BYTES * 4 * every * d, double + single)
    return [*ops, attention]


def autoencoder_ops(model: str, half: str, latent_pixels: int, count: int = 1) -> list[Op]:
    """Operators of "encode", "decode" or "features" (what verification reads) on `count` pictures, one by one."""
    cost = AUTOENCODERS[model][half]
    elements = latent_pixels * cost.elements + cost.weights
    attention = Op("attention", 4 * cost.channels * latent_pixels**2, BYTES * 4 * latent_pixels * cost.channels, count)
    return [Op("layers", latent_pixels * cost.flops, BYTES * elements, count), attention]


def verification_ops(config: SpecEditConfig, model: str, latent_pixels: int, draft_tokens: int) -> list[Op]:
    """Operators that turn a draft into a score: "semantic" compares decoder features of draft and reference."""
    if config.selector == "variance":
        return []
    if config.selector == "edges":
        return autoencoder_ops(model, "decode", latent_pixels)
    draft_pixels = 4 * (draft_tokens - MODELS[model].text_tokens) // 2
    compared = latent_pixels if config.verify_at == "full" else draft_pixels
    return autoencoder_ops(model, "features", compared, count=2)


def plan(
    config: SpecEditConfig | str,
    model: str,
    height: int,
    width: int,
    edit_fraction: float,
    gpu: str,
) -> dict[str, Any]:
    """Predict operations, bytes and seconds of a run of one image on `gpu`, and of the stock pipeline's 50 steps.

    Args:
        config, model, height, width, edit_fraction: as for `specedit.flops.plan`.
        gpu: "A100", "H100", "H200" or "B200".

    Returns:
        `nfe`, `flops_ratio` (transformer alone, as everywhere), `clock_ratio` of the roofline seconds with encoding,
        verification and decoding, their `quotient`, `seconds`, `seconds_stock`, `gpu`, and `stages`: a list of {"name",
        "steps", "tokens", "flops", "bytes", "seconds"}.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    config = resolve(config)
    predicted = plan_flops(config, model, height, width, edit_fraction)
    passes, hardware = MODELS[model].passes, GPUS[gpu]
    latent = 4 * (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)  # latent pixels: a token is 2 x 2

    def stage(name: str, ops: list[Op], steps: int = 0, tokens: int = 0) -> dict[str, Any]:
        times = passes * steps if steps else 1
        return dict(
            name=name, steps=steps, tokens=tokens, flops=times * sum(op.count * op.flops for op in ops),
            bytes=times * sum(op.count * op.bytes for op in ops), seconds=times * roofline(ops, hardware),
        )  # fmt: skip

    encode = stage("encode", autoencoder_ops(model, "encode", latent))
    decode = stage("decode", autoencoder_ops(model, "decode", latent))
    stages = [encode]
    for row in predicted["stages"]:
        stages.append(stage(row["name"], transformer_ops(model, row["tokens"]), row["steps"], row["tokens"]))
        if row["name"] == "draft":
            stages.append(stage("verify", verification_ops(config, model, latent, row["tokens"])))
    stages.append(decode)
    full = MODELS[model].text_tokens + 2 * (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    stock = stage("stock", transformer_ops(model, full), STOCK_STEPS, full)
    seconds = sum(s["seconds"] for s in stages)
    seconds_stock = encode["seconds"] + stock["seconds"] + decode["seconds"]
    clock = seconds_stock / seconds
    return dict(
        gpu=gpu, nfe=predicted["nfe"], flops_ratio=predicted["flops_ratio"], clock_ratio=clock,
        quotient=clock / predicted["flops_ratio"], seconds=seconds, seconds_stock=seconds_stock, stages=stages,
    )  # fmt: skip


def step_seconds(model: str, tokens: int, gpu: str) -> float:
    """Roofline seconds of one step (every guidance pass) over one sequence."""
    return MODELS[model].passes * roofline(transformer_ops(model, tokens), GPUS[gpu])


def share_of_peak(model: str, tokens: int, gpu: str) -> float:
    """How much of the peak the roofline leaves to one step: below 1 where weights or activations are the limit."""
    flops = MODELS[model].passes * transformer_flops(MODELS[model].config, tokens)
    return flops / step_seconds(model, tokens, gpu) / GPUS[gpu].flops


def measured_row(
    results: Iterable[Mapping[str, Any]], config: SpecEditConfig, model: str, height: int, width: int,
    edit_fraction: float, gpu: str,
) -> dict[str, Any] | None:  # fmt: skip
    """The row of `end_to_end` result files that measured what a plan predicts, the fastest where there are several.

    None where no file was made on that GPU with that preset, restore, size, one image, and nearly that share edited.
    """
    found = [
        row
        for content in results
        if gpu in (content["machine"].get("gpu") or "")
        for row in content["rows"]
        if row["model"] == model
        and (row["preset"], row["restore"]) == (preset_of(config), config.restore)
        and (row["height"], row["width"], row.get("batch", 1)) == (height, width, 1)
        and abs(row["edit_fraction"] - edit_fraction) <= MATCHING
    ]
    return min(found, key=lambda row: row["seconds"], default=None)


def preset_of(config: SpecEditConfig) -> str:
    """The preset that `config` is, whatever its restore; "custom" otherwise."""
    return resolve(config, restore="full").name

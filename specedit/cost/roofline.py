"""Predicts a run on a GPU, without the GPU: operations, bytes and roofline seconds of every stage.

Nothing is run and nothing is measured. An operator (a matrix product, attention, a norm, ...) takes at least
max(operations / peak, bytes / bandwidth), where it reads its inputs and weights once and writes its output once
(the roofline model: Williams, Waterman and Patterson, CACM 52 (2009)); a stage takes the sum over its operators. That
is a bound from below for operators run one by one in bf16: kernels fall short of the peak, and launching them takes
time that no roofline knows. Encoding the prompt is left out, as embeddings may be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..config import STOCK_STEPS, SpecEditConfig, presets, resolve
from ..layout import TokenGrid
from ..method.trace import ForwardCall
from ..registry import selectors
from .blocks import field
from .flops import plan
from .forward import transformer_flops
from .operators import BYTES, GatedBlocks, GatedStream, Op, pointwise, product
from .tables import MODELS, TOKEN_PIXELS

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
class HalfCost:
    """One half of an autoencoder, per latent pixel: `flops` of convolutions and projections, `elements` that its layers
    read and write, `weights` in all; `channels` of the attention in its middle, quadratic in latent pixels.

    Counted over the released configurations; tests/cost/test_roofline.py counts again.
    """

    flops: float
    elements: float
    weights: float
    channels: int


_FLUX_AUTOENCODER = {
    "encode": HalfCost(264_454_144, 459_024, 34_274_208, 512),
    "features": HalfCost(68_304_896, 46_608, 27_094_016, 512),
    "decode": HalfCost(605_618_176, 837_328, 49_545_475, 512),
}
_FLUX2_AUTOENCODER = {
    "encode": HalfCost(264_757_248, 459_232, 34_421_696, 512),
    "features": HalfCost(68_452_352, 46_624, 27_167_744, 512),
    "decode": HalfCost(605_767_680, 837_408, 49_619_203, 512),
}
AUTOENCODERS: Mapping[str, Mapping[str, HalfCost]] = MappingProxyType(
    {
        "flux-kontext": _FLUX_AUTOENCODER,
        "longcat-image-edit": _FLUX_AUTOENCODER,
        **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "flux2-klein-9b-kv"), _FLUX2_AUTOENCODER),
        "qwen-image-2.1": {
            "encode": HalfCost(758_546_432, 1_693_697, 78_675_680, 768),
            "features": HalfCost(346_374_144, 127_936, 140_042_880, 1152),
            "decode": HalfCost(4_139_245_568, 4_621_888, 259_044_052, 1152),
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


def transformer_ops(
    model: str, tokens: float, batch: int = 1, *, text: float | None = None, keys: float | None = None,
    read: float | None = None,
) -> list[Op]:  # fmt: skip
    """Operators of one forward pass over `batch` sequences of `tokens` (text + target + reference) each.

    A double block has weights of its own for the text and the image stream, a single block one set for all. Their
    operations add up to `flops.transformer_flops`; what that leaves out has bytes here, but no operations.

    text: how many of the tokens are text (None: the model's usual prompt). keys, read: as for `transformer_flops`.
    """
    cost = MODELS[model]
    spoken = cost.text_tokens if text is None else text
    double, single = cost.config["num_layers"], cost.config.get("num_single_layers", 0)
    d = cost.config["num_attention_heads"] * cost.config["attention_head_dim"]
    words, every = batch * spoken, batch * tokens
    beside = tokens if keys is None else keys

    def attention(query_rows: float, count: float) -> Op:
        return Op(
            "attention", batch * 4 * query_rows * beside * d, BYTES * batch * 2 * (query_rows + beside) * d, count
        )

    blocks = _blocks_of(cost.config, d)
    ops = [op for rows in (words, every - words) if rows for op in blocks.stream(rows, rows, double)]
    ops += [*blocks.shared(), *blocks.single(every, every, single), attention(tokens, double + single)]
    if read is None:
        return ops
    # The last block: a single one where there are any, else a double one, of whose text nothing is read.
    wanted = batch * read
    if single:
        whole, part = blocks.single(every, every, 1), blocks.single(every, wanted, 1)
    else:
        streams = ((words, 0), (every - words, wanted))
        whole = [op for rows, _ in streams if rows for op in blocks.stream(rows, rows, 1)]
        part = [op for rows, asked in streams if rows for op in blocks.stream(rows, asked, 1)]
    less = [replace(op, count=-op.count) for op in (*whole, attention(tokens, 1))]
    return [*ops, *less, *part, attention(read, 1)]


def _blocks_of(config: Mapping[str, Any], d: float) -> GatedBlocks | _Blocks:
    """A model's blocks, of width `d`."""
    if field(config, "causal_condition") is not None:
        return GatedStream(d, config["mlp_ratio"])
    gated = field(config, "timestep_guidance_channels") is not None
    return GatedBlocks(d, config["mlp_ratio"]) if gated else _Blocks(d)


class _Blocks:
    """FLUX.1's and Qwen's blocks of width `d`."""

    def __init__(self, d: float):
        self.d = d

    def shared(self) -> list[Op]:
        """What a forward pass computes once for all blocks."""
        return []

    def _qkv(self, rows: float, asked: float, count: float) -> list[Op]:
        """Projections for `rows`, queries of `asked` of them, with norm and rotary embedding."""
        d = self.d
        placed = pointwise("qk norm and rotary", 2 * (rows + asked) * d, count)
        if rows == asked:
            return [product("qkv", rows, d, 3 * d, count), placed]
        return [product("q", asked, d, d, count), product("kv", rows, d, 2 * d, count), placed]

    def stream(self, rows: float, asked: float, count: float) -> list[Op]:
        """One stream of double blocks; only `asked` of its rows go beyond their keys and values."""
        d = self.d
        return [
            pointwise("modulation", 6 * d * d, count),
            pointwise("norm", 2 * rows * d, count),
            *self._qkv(rows, asked, count),
            product("projection", asked, d, d, count),
            pointwise("norm", 2 * asked * d, count),
            product("mlp up", asked, d, 4 * d, count),
            pointwise("gelu", 8 * asked * d, count),
            product("mlp down", asked, 4 * d, d, count),
            pointwise("gate and add", 3 * asked * d, 2 * count),
        ]

    def single(self, rows: float, asked: float, count: float) -> list[Op]:
        """Single blocks, as `stream`."""
        d = self.d
        if not count:
            return []
        return [
            pointwise("modulation", 3 * d * d, count),
            pointwise("norm", 2 * rows * d, count),
            *self._qkv(rows, asked, count),
            product("mlp up", asked, d, 4 * d, count),
            pointwise("gelu", 8 * asked * d, count),
            pointwise("cat", 10 * asked * d, count),
            product("projection and mlp down", asked, 5 * d, d, count),
            pointwise("gate and add", 3 * asked * d, count),
        ]


def measuring_ops(model: str, call: ForwardCall) -> list[Op]:
    """Operators that compute the logits of a call's measured queries once more, and read the keys again."""
    if not call.measured:
        return []
    config = MODELS[model].config
    d, layers = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["num_layers"] + config.get("num_single_layers", 0),
    )
    pairs = call.samples * call.measured * call.tokens
    return [Op("measure", 2 * d * pairs, BYTES * call.samples * call.tokens * d, layers)]


def autoencoder_ops(model: str, half: str, latent_pixels: int, count: int = 1) -> list[Op]:
    """Operators of "encode", "decode" or "features" (what verification reads) on `count` pictures, one by one."""
    cost = AUTOENCODERS[model][half]
    elements = latent_pixels * cost.elements + cost.weights
    attention = Op("attention", 4 * cost.channels * latent_pixels**2, BYTES * 4 * latent_pixels * cost.channels, count)
    return [Op("layers", latent_pixels * cost.flops, BYTES * elements, count), attention]


def verification_ops(config: SpecEditConfig, model: str, latent_pixels: int, draft_tokens: int) -> list[Op]:
    """Operators that turn a draft of so many target tokens into a score: decoder features of draft and reference, the
    decoded draft, or nothing of the decoder."""
    reads = selectors[config.selector].needs_decoder
    if reads is None:
        return []
    if reads == "picture":
        return autoencoder_ops(model, "decode", latent_pixels)
    draft_pixels = MODELS[model].latent_pixels * draft_tokens
    compared = latent_pixels if config.verify_at == "full" else draft_pixels
    return autoencoder_ops(model, "features", compared, count=2)


def predict_roofline(
    config: SpecEditConfig | str,
    model: str,
    height: int,
    width: int,
    edit_fraction: float,
    gpu: str,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Predict operations, bytes and seconds of a run of one image on `gpu`, and of the stock pipeline.

    Args:
        config, model, height, width, edit_fraction, strength: as for `specedit.flops.plan`.
        gpu: "A100", "H100", "H200" or "B200".

    Returns:
        `nfe`, `flops_ratio` (transformer alone, as everywhere), `clock_ratio` of the roofline seconds with encoding,
        verification and decoding, both against `stock_steps`, the model's own default; `flops_ratio_50` and
        `clock_ratio_50` against 50 stock steps, which take `seconds_stock`, and the `quotient` of these two; `seconds`,
        `gpu`, `modulation` as in `plan`, and `stages`: a list of {"name", "steps", "tokens", "flops", "bytes",
        "seconds"}, with a row "modulation" where it is made once.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    config = resolve(config)
    predicted = plan(config, model, height, width, edit_fraction, strength=strength)
    hardware = GPUS[gpu]
    grid = TokenGrid(height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    pixels = MODELS[model].latent_pixels
    latent, drafted = pixels * grid.tokens, grid.coarse(config.draft_scale).tokens

    def stage(name: str, ops: Iterable[tuple[float, list[Op]]], steps: int = 0, tokens: int = 0) -> dict[str, Any]:
        """A row from groups of operators and how often each runs."""
        listed = [replace(op, count=times * op.count) for times, group in ops for op in group]
        return dict(
            name=name, steps=steps, tokens=tokens, flops=sum(op.count * op.flops for op in listed),
            bytes=sum(op.count * op.bytes for op in listed), seconds=roofline(listed, hardware),
        )  # fmt: skip

    def forward(call: ForwardCall) -> list[Op]:
        ops = transformer_ops(model, call.tokens, call.samples, text=call.text, keys=call.keys, read=call.read)
        ops = [op for op in ops if op.name != "modulation"] if config.modulation == "once" else ops
        return ops + measuring_ops(model, call)

    encode = stage("encode", [(1, autoencoder_ops(model, "encode", latent))])
    decode = stage("decode", [(1, autoencoder_ops(model, "decode", latent))])
    stages, verify, before = [encode], None, 0
    made = predicted["modulation"]
    if config.modulation == "once":
        stages.append(stage("modulation", [(made["reads_once"], [Op("modulation", 0, made["weight_bytes"])])]))
    for row in predicted["stages"]:
        if row["name"] == "full" and config.restore == "pixels" and before < row["tokens"]:
            small = pixels * grid.coarse().tokens
            halves = [autoencoder_ops(model, *half) for half in (("decode", small), ("encode", latent))]
            stages.append(stage("pixels", [(1, ops) for ops in halves]))
        before = row["tokens"]
        calls = [(call.count, forward(call)) for call in row["calls"] if call.tokens]
        stages.append(stage(row["name"], calls, row["steps"], row["tokens"]))
        if row["name"] == "draft":
            verify = verification_ops(config, model, latent, drafted)
            stages.append(stage("verify", [(1, verify)]))
        if row["name"] == "coarse" and config.verifies_coarse and strength == 1:
            name = "verify" if verify is None else "second look"
            verify = verification_ops(config, model, latent, drafted) if verify is None else verify
            stages.append(stage(name, [(1, verify)]))
    stages.append(decode)
    seconds = sum(s["seconds"] for s in stages)

    def stock_seconds(steps: int) -> float:
        calls = MODELS[model].stock_calls(2 * grid.tokens, steps)
        denoised = sum(call.count * roofline(forward(call), hardware) for call in calls)
        return float(encode["seconds"] + denoised + decode["seconds"])

    seconds_stock = stock_seconds(STOCK_STEPS)
    clock = seconds_stock / seconds
    ratios = {name: predicted[name] for name in ("stock_steps", "flops_ratio", "flops_ratio_50")}
    return dict(
        gpu=gpu, nfe=predicted["nfe"], **ratios, clock_ratio=stock_seconds(predicted["stock_steps"]) / seconds,
        clock_ratio_50=clock, quotient=clock / predicted["flops_ratio_50"], seconds=seconds,
        seconds_stock=seconds_stock, stages=stages, modulation=made,
    )  # fmt: skip


def step_seconds(model: str, tokens: float, gpu: str) -> float:
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
        and (row["preset"], row["restore"], row.get("changes", "")) == (preset_of(config), config.restore, "")
        and (row["height"], row["width"], row.get("batch", 1)) == (height, width, 1)
        and abs(row["edit_fraction"] - edit_fraction) <= MATCHING
    ]
    return min(found, key=lambda row: row["seconds"], default=None)


def preset_of(config: SpecEditConfig) -> str:
    """The preset that `config` is, whatever its restore; "custom" otherwise."""
    changes = ((name, set(config._changes(preset))) for name, preset in presets.items())
    return next((name for name, changed in changes if changed <= {"restore"}), "custom")

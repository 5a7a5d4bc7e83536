"""The cost model: floating-point operations of a transformer call, and of a whole run before it is run.

One multiply-add counts as two operations. Decoder, text encoder and verification are left out, as in the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ..config import FULL_EDIT_SHARE, STOCK_STEPS, SpecEditConfig, resolve
from ..forecast import ReferenceKVCache, full_steps
from ..method.schedule import Stage, stage_sigmas, stages

TOKEN_PIXELS = 16  # side of one packed token in pixels: 8x VAE, 2x2 patches
CHANNELS = 64  # of a packed token: 16 latent channels, 2x2 patches
# The released editors' schedulers.
FLUX_SCHEDULER = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
    max_image_seq_len=4096,
)  # fmt: skip
QWEN_SCHEDULER = dict(
    shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
    max_image_seq_len=8192, shift_terminal=0.02,
)  # fmt: skip


@dataclass(frozen=True)
class ModelCost:
    """What the cost model knows of a model.

    `config`: the fields of the transformer's configuration that `transformer_flops` reads. `text_tokens`: length of
    the text stream, `vision_tokens` those of them that stand for the condition image. `passes`: transformer calls per
    step (2 with classifier-free guidance). `scheduler`: fields of its configuration, which say at which sigmas the
    steps of a stage lie. `default_steps`: of the stock pipeline's call.
    """

    config: Mapping[str, int]
    text_tokens: int
    passes: int
    vision_tokens: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict, compare=False)
    default_steps: int = STOCK_STEPS

    def step(self, image_tokens: int) -> float:
        """Operations of one stock step over so many image tokens beside the whole text."""
        return self.passes * transformer_flops(self.config, self.text_tokens + image_tokens)


MODELS: Mapping[str, ModelCost] = MappingProxyType(
    {
        # FLUX.1-Kontext-dev: 19 double and 38 single blocks, 512 T5 tokens, distilled guidance (one pass).
        "flux-kontext": ModelCost(
            {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128},
            512,
            1,
            scheduler=FLUX_SCHEDULER,
            default_steps=28,
        ),
        # Qwen-Image-Edit: 60 double-stream blocks; the text stream holds about 1,340 vision tokens of the condition
        # image (1 MP in patches of 28 px) and about 60 words; true classifier-free guidance (two passes).
        "qwen-image-edit": ModelCost(
            {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
            1340 + 60,
            2,
            vision_tokens=1340,
            scheduler=QWEN_SCHEDULER,
        ),
    }
)


def _field(config: Any, name: str, default: int | None = None) -> int:
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    if value is None:
        raise ValueError(f"model_config: expected a field {name!r}, got a {type(config).__name__} without it")
    return int(value)


def transformer_flops(model_config: Any, tokens: float, keys: float | None = None, read: float | None = None) -> float:
    """Operations of one forward pass over one sequence: tokens * (L*24*d^2 + L*4*d*tokens).

    Per token and block: the four attention projections (8 d^2) and the MLP of ratio 4 (16 d^2); a FLUX single block
    holds the same matrices fused (6 + 8 + 10 d^2). Attention adds Q K^T and P V, each 2*d per pair of tokens.
    Modulation, norms, embeddings and the output projection are below 1 % and left out. FLUX at 8704 tokens
    (1024 x 1024, reference, 512 text): 165.4 T; the paper's Table 5 has 8299.54 / 50 = 166.0 T.

    Args:
        model_config: a diffusers transformer config, mapping or object: num_layers, num_attention_heads,
            attention_head_dim, and num_single_layers where the model has single blocks.
        tokens: length of the whole sequence (text + target + reference). A mean over samples may be fractional.
        keys: tokens attended to, where that is more than `tokens`: keys and values of the others come from a cache.
        read: tokens whose output is read, where the last block computes no others: of the rest only keys and values
            (4 d^2). None: that block computes all of them.

    Raises:
        ValueError: a field is missing, or `tokens` is negative.
    """
    if not tokens >= 0:
        raise ValueError(f"tokens: expected a number of at least 0, got {tokens!r}")
    layers = _field(model_config, "num_layers") + _field(model_config, "num_single_layers", 0)
    d = _field(model_config, "num_attention_heads") * _field(model_config, "attention_head_dim")
    keys = tokens if keys is None else keys
    if read is None:
        return float(tokens * (layers * 24 * d * d + layers * 4 * d * keys))
    last = tokens * 4 * d * d + read * (20 * d * d + 4 * d * keys)
    return float(tokens * ((layers - 1) * 24 * d * d + (layers - 1) * 4 * d * keys) + last)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _cells(rows: int, cols: int, side: int) -> int:
    """Cells of side x side tokens that cover a rows x cols grid; partial ones at the border count."""
    return _ceil_div(rows, side) * _ceil_div(cols, side)


def expanded_cells(config: SpecEditConfig, rows: int, cols: int, edit_fraction: float) -> int:
    """Expected number of expanded cells on a rows x cols coarse grid.

    The edited cells, and of the unedited ones the share that uniform coverage (eq. 9) picks anyway. All of them where a
    run edits everything: nearly all are edited, or none was found and what is not found is kept.
    """
    cells = rows * cols
    if edit_fraction > FULL_EDIT_SHARE or (edit_fraction == 0 and config.preserves_unedited):
        return cells
    edited = edit_fraction * cells
    uniform = _cells(rows, cols, config.uniform_stride) / cells if config.uniform_stride else 0.0
    return round(edited + uniform * (cells - edited))


def plan(
    config: SpecEditConfig | str,
    model: str | ModelCost,
    height: int,
    width: int,
    edit_fraction: float,
) -> dict[str, Any]:
    """Predict the cost of a run without running it, for one image whose reference has the output's size.

    Tokens of a sequence are text + target + reference; the reference takes the target's layout in the draft, coarse
    and mixed stages and is full in the full stage. Per coarse cell: one token when locked, four when expanded.

    Args:
        config: a SpecEditConfig or a preset's name.
        model: "flux-kontext" or "qwen-image-edit", or the ModelCost of another one.
        height, width: output size in pixels, at least 16; rounded down to whole tokens of 16 pixels.
        edit_fraction: share of the coarse cells that are edited (0..1), dilation included. Uniform coverage comes on
            top of it.

    Returns:
        `nfe`, `flops` (draft included), `flops_stock` (50 full steps), `flops_ratio_50` (these over this run),
        `stock_steps` (the model's own default) and `flops_ratio` (as many full steps over this run), and `stages`: a
        list of {"name", "steps", "cached", "reused", "tokens", "flops", "calls"} in order, the draft first, with
        `tokens` per sequence, `flops` of all the stage's steps and guidance passes, and of the steps how many a
        temporal cache answers and how many run over the target's tokens alone. `calls` lists what is computed, a
        `Forward` and how often, guidance passes counted one by one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    config = resolve(config)
    if not isinstance(model, ModelCost) and model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    for name, value in (("height", height), ("width", width)):
        if value < TOKEN_PIXELS:
            raise ValueError(f"{name}: expected at least {TOKEN_PIXELS} pixels, got {value!r}")
    if not 0 <= edit_fraction <= 1:
        raise ValueError(f"edit_fraction: expected a number from 0 to 1, got {edit_fraction!r}")

    rows, cols = int(height) // TOKEN_PIXELS, int(width) // TOKEN_PIXELS
    fine = rows * cols
    coarse = _cells(rows, cols, 2)
    expanded = expanded_cells(config, _ceil_div(rows, 2), _ceil_div(cols, 2), edit_fraction)
    target = {
        "draft": _cells(rows, cols, config.draft_scale),
        "coarse": coarse,
        "mixed": coarse - expanded + round(fine * expanded / coarse),
        "full": fine,
    }
    cost = model if isinstance(model, ModelCost) else MODELS[model]
    text = dict.fromkeys(target, cost.text_tokens)
    if config.draft_condition == "small":  # a picture that is smaller by draft_scale a side has as many fewer tokens
        text["draft"] -= cost.vision_tokens - _ceil_div(cost.vision_tokens, config.draft_scale**2)

    listed = [
        _stage(config, cost, stage, target[stage.name], text[stage.name], first=i == 0)
        for i, stage in enumerate(stages(config))
    ]
    if config.uses_draft:
        draft = Stage("draft", 1.0, 0.0, config.draft_steps)
        listed.insert(0, _stage(config, cost, draft, target["draft"], text["draft"], first=False))
    flops = sum(stage["flops"] for stage in listed)
    stock = STOCK_STEPS * cost.step(2 * fine)
    return {
        "nfe": config.nfe, "flops": flops, "flops_stock": stock, "flops_ratio_50": stock / flops,
        "stock_steps": cost.default_steps, "flops_ratio": stock / flops * (cost.default_steps / STOCK_STEPS),
        "stages": listed,
    }  # fmt: skip


@dataclass(frozen=True)
class Forward:
    """One forward pass: as `transformer_flops`, with `text` of the tokens."""

    tokens: int
    text: int
    keys: int | None = None
    read: int | None = None


def _stage(
    config: SpecEditConfig, cost: ModelCost, stage: Stage, own: int, text: int, *, first: bool
) -> dict[str, Any]:
    """A row of `plan`: the steps of one stage over `own` target tokens, as many of the reference, and the text."""
    options = None if stage.name == "draft" else config.forecast_options
    pattern = [True] * stage.steps
    if options is not None:
        pattern = full_steps(stage.steps, options.interval, options.warmup(first))
    kept = None if config.reference_refresh is None else ReferenceKVCache(config.reference_refresh)
    whole, trims = text + 2 * own, config.attention != "stock"
    calls: Counter[Forward] = Counter()
    forecasts, since, reused = 0.0, 0, 0
    for i, (full, passes) in enumerate(zip(pattern, _passes(config, cost, stage, own), strict=True)):
        since = 0 if full else since + 1
        if full and kept is not None and kept.calls(i, passes)[0].target:
            calls[Forward(own, 0, whole, own if trims else None)] += passes
            reused += 1
        elif full:
            calls[Forward(whole, text, None, own if trims else None)] += passes
        elif options is None:
            raise AssertionError("only a forecast leaves steps out")
        elif options.token_wise and options.recomputes(since):
            fresh = options.fresh_tokens(own)
            calls[Forward(text + fresh, text, whole, fresh)] += passes
        else:
            forecasts += passes * options.operations(own * CHANNELS)
    computed = sum(n * transformer_flops(cost.config, c.tokens, c.keys, c.read) for c, n in calls.items())
    return {
        "name": stage.name, "steps": stage.steps, "cached": pattern.count(False), "reused": reused, "tokens": whole,
        "flops": computed + forecasts, "calls": list(calls.items()),
    }  # fmt: skip


def _passes(config: SpecEditConfig, cost: ModelCost, stage: Stage, own: int) -> list[int]:
    """Guidance passes of every step of a stage."""
    if config.guidance_range is None:
        return [cost.passes] * stage.steps
    low, high = config.guidance_range
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(cost.scheduler))
    sigmas = stage_sigmas(scheduler, own, stage.start, stage.end, stage.steps).tolist()
    return [cost.passes if low <= sigma <= high else 1 for sigma in sigmas[:-1]]

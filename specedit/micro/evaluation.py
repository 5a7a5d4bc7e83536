"""Score a pipeline on tasks with exact results, and on textures, which have many right ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checks import integer
from ..evaluation.metrics import mean, psnr
from .editors import editor_named, editor_of
from .judging import Judge, judge_of
from .scenes import Case, sample

MARGIN = 16  # px around the edit mask that keep_psnr ignores
NEAR = 18.0  # dB to the target that an edited region must reach
TEXTURE_SEED = 10**6  # of the first texture in tables: their seeds are not those of tasks of other kinds


def arguments(image: Image.Image, model: str = "kontext") -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, besides image and prompt. `model`: "kontext" or "qwen".

    They make an editor work at the image's own size; the editors are trained for 128 to 512 px. "qwen" also gets a
    negative prompt, which turns its guidance on.

    Raises:
        ValueError: another model.
    """
    return editor_named(model).arguments(image)


def grow(mask: np.ndarray, by: int) -> np.ndarray:
    """A bool mask (H, W) dilated by `by` px on each side."""
    grown = torch.from_numpy(mask)[None, None].float()
    return torch.nn.functional.max_pool2d(grown, 2 * by + 1, stride=1, padding=by)[0, 0].numpy() > 0


def score(image: Image.Image, case: Case, judge: Judge | None = None) -> dict[str, Any]:
    """`success`, `edit_psnr`, `keep_psnr` of one result; of a texture `keep_psnr` and what `Judge.score` gives.

    success: inside the edit mask, the PSNR to the target exceeds the one to the source and reaches 18 dB.
    edit_psnr: dB to the target inside the edit mask. keep_psnr: dB to the source outside it, without a margin of 16 px;
    nan if everything was to change. A texture is judged by `judge`, or without one against fresh renders as drawn.

    Raises:
        ValueError: an image of another size than the case's.
    """
    if image.size != case.source.size:
        expected, got = (f"{width} x {height}" for width, height in (case.source.size, image.size))
        raise ValueError(f"image: expected {expected} as the case, got {got}; sides are whole tokens of 16 px")
    result, source, target = (np.asarray(i) for i in (image, case.source, case.target))
    kept = dict(keep_psnr=psnr(result, source, ~grow(case.mask, MARGIN)))
    if case.kind == "texture":
        return kept | (judge or Judge()).score(image, case)
    edit, untouched = psnr(result, target, case.mask), psnr(result, source, case.mask)
    return dict(success=bool(edit > untouched and edit >= NEAR), edit_psnr=edit) | kept


def texture_cases(count: int, size: int | tuple[int, int] = 512, first: int = 0) -> list[Case]:
    """Textures for a table, about half of them backgrounds: the scenes of seeds from `TEXTURE_SEED` + `first`.

    No task of another kind, and no training, uses these seeds. Tables for choosing settings have another `first` than
    tables that report quality.

    Raises:
        TypeError, ValueError: `count` is not an integer of at least 0.
    """
    count = integer("count", count, 0)
    return [sample(TEXTURE_SEED + first + i, size, "texture") for i in range(count)]


def textures_beside(count: int, given: int | None = None) -> int:
    """How many textures a table of `count` other tasks has: those given, else a quarter as many."""
    return count // 4 if given is None else given


def tasks(count: int, textures: int, size: int | tuple[int, int] = 512, first: int = 0) -> Iterator[Case]:
    """The tasks of a table: `count` with one right answer, of seeds from `first`, then `textures` of `texture_cases`.

    Each is drawn when it is asked for, because the pictures of a long table do not fit into memory.
    """
    for i in range(count):
        yield sample(first + i, size)
    for i in range(textures):
        yield from texture_cases(1, size, first + i)


def evaluate(pipe: Any, cases: Iterable[Case], num_inference_steps: int | None = None, **call: Any) -> dict[str, Any]:
    """Run a pipeline on tasks and score the results.

    Args:
        pipe: stock or with SpecEdit installed. A stock pipeline runs 50 steps, an installed one its preset's number.
        cases: from `scenes.sample` and `texture_cases`.
        num_inference_steps: overrides both.
        call: further arguments of the pipeline's call.

    Returns:
        {"mean": {...}, "kinds": {...}, "cases": [...]}. Each case has seed, kind, mask_share, success, edit_psnr,
        keep_psnr, flops and seconds. A texture has texture_distance, material, seam and the distance's parts instead of
        success and edit_psnr; the fresh renders that it is compared with went through the pipeline's autoencoder, so
        that 1.0 can be reached, see `judging.Judge`. With a report, also edit_fraction, missed (empty drafts) and
        flops_ratio, which is the report's flops_ratio_50, because a stock pipe runs 50 steps here. Means are over the
        cases that have the number, and ignore nan.
    """
    from ..api.installing import is_active, last_report
    from ..config import STOCK_STEPS

    active, editor = is_active(pipe), editor_of(pipe)
    steps = num_inference_steps
    if steps is None and not active:
        steps = STOCK_STEPS
    rows = []
    for case in cases:
        given = {**editor.arguments(case.source), **call}
        if steps is not None:
            given["num_inference_steps"] = steps
        given.setdefault("generator", torch.Generator().manual_seed(case.seed))
        began = time.perf_counter()
        image = pipe(image=case.source, prompt=case.prompt, **given).images[0]
        seconds = time.perf_counter() - began
        row = dict(
            seed=case.seed, kind=case.kind, mask_share=float(case.mask.mean()), **score(image, case, judge_of(pipe))
        )
        row["seconds"] = seconds
        if active and (run := last_report(pipe)) is not None:
            row |= dict(flops=run.flops, flops_ratio=run.flops_ratio_50, edit_fraction=run.edit_fraction)
            row |= dict(missed=run.empty_drafts)
        else:
            taken = given.get("num_inference_steps", editor.default_steps)
            row["flops"] = stock_flops(pipe, case, taken, given)
        rows.append(row)
    return {**summary(rows), "cases": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The "mean" of cases as `evaluate` returns them, and under "kinds" the mean of each kind."""
    kinds = sorted({row["kind"] for row in rows})
    return {"mean": mean(rows), "kinds": {kind: mean([r for r in rows if r["kind"] == kind]) for kind in kinds}}


def stock_flops(pipe: Any, case: Case, steps: int, call: dict[str, Any] | None = None) -> float:
    """Transformer FLOPs of a stock run: target, reference and text tokens at every step, under each prompt.

    `call`: the call's arguments, if not those of `arguments`.
    """
    from ..cost.flops import transformer_flops

    editor = editor_of(pipe)
    passes = editor.passes(pipe, case, editor.arguments(case.source) if call is None else call)
    return steps * sum(transformer_flops(pipe.transformer.config, tokens) for tokens in passes)

"""The report of a run: what its trace holds, with the cost of every stage."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ..config import STOCK_STEPS
from ..cost.forward import flops_of
from ..field_checks import first_step
from ..method.adapter import Run
from ..method.sampler import Outcome
from ..method.trace import ForwardCall, stock_calls
from ..run_report import RunReport, StageReport


def report_of(
    run: Run, outcome: Outcome, images: Any, call: dict[str, Any], seconds: float, reused: Mapping[str, int]
) -> RunReport:
    """The report of a run that has ended. images: what the call returns. call: its arguments. reused: how many
    inputs of each kind were not encoded again."""
    state, cells = run.state, outcome.cells
    stages = [_with_flops(run, stage) for stage in run.trace.stages]
    mixed = any(stage.name == "mixed" for stage in stages)
    default = stock_steps(run.pipe, call)
    steps = run.adapter.asked_steps(run.pipe, default) or default
    steps -= first_step(steps, run.adapter.strength(call))
    picture = None
    if (source := state.conditioning.source) is not None:
        picture = run.pipe.image_processor.numpy_to_pil(source[:1].permute(0, 2, 3, 1).cpu().numpy())[0]
    return RunReport(
        nfe=run.trace.steps,  # fewer than asked after an interrupt
        draft_steps=sum(stage.steps for stage in stages if stage.name == "draft"),
        stages=stages,
        flops=sum(stage.flops for stage in stages),
        flops_stock=flops_of(_stock_calls(run, steps), run.pipe.transformer.config),
        seconds=seconds,
        score=None if outcome.score is None else outcome.score.cpu(),
        edit_mask=cells.detected.cpu() if outcome.has_edit_mask else None,
        expand_mask=cells.refined.cpu() if outcome.has_edit_mask or mixed else None,
        config=run.config,
        source=picture,
        edit=images[0] if call["output_type"] == "pil" else None,
        cache_bytes=run.trace.cache_bytes,
        empty_drafts=outcome.empty_drafts,
        stock_steps=steps,
        overflowed=outcome.overflowed,
        reused=dict(reused),
        decoded_fraction=run.trace.decoded,
        modulation=_modulation(run),
    )


def _modulation(run: Run) -> dict[str, int]:
    """Of the report."""
    kept = run.modulation
    return {} if kept is None else {"passes": kept.passes, "bytes": kept.memory}


def _with_flops(run: Run, stage: StageReport) -> StageReport:
    calls = [call for call in run.trace.calls if call.stage == stage.name]
    return dataclasses.replace(stage, flops=flops_of(calls, run.pipe.transformer.config))


def _stock_calls(run: Run, steps: int) -> list[ForwardCall]:
    """The forward calls of the stock pipeline, with so many steps."""
    state = run.state
    prefixes = None
    if state.fixed_prefix:
        prefixes = 1 if state.keeps_prefix else steps
    return stock_calls(
        state.texts, state.grid.tokens, state.reference_grid.tokens, steps, samples=state.batch,
        fixed_reference=run.adapter.fixed_reference, prefixes=prefixes,
    )  # fmt: skip


def stock_steps(pipe: Any, call: dict[str, Any]) -> int:
    """Steps that the stock pipeline would take: what the caller gave, else the call's own default."""
    if (asked := call.get("num_inference_steps")) is not None:
        return int(asked)
    for base in type(pipe).__mro__:
        parameters = inspect.signature(base.__call__).parameters if "__call__" in vars(base) else {}
        if "num_inference_steps" in parameters:
            return int(parameters["num_inference_steps"].default)
    return STOCK_STEPS

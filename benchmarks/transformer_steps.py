"""One transformer step against the number of tokens: where the curve is flat, kernel launches dominate."""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import real_models
from benchmarks.editor_bench import Bench, Case, edit_cells, first_line
from specedit.config import SpecEditConfig
from specedit.cost.flops import transformer_flops
from specedit.layout import MixedLayout, TokenGrid
from specedit.method.adapter import EditState, LayoutGroup, Run

SIDES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the output's grid; every token fine
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of its cells, expanded in a mixed sequence
CALLS = 5  # back to back without synchronising, as in a run


def sequences(grid: TokenGrid, device: torch.device) -> Iterator[tuple[str, MixedLayout]]:
    for side in SIDES:
        small = TokenGrid(max(1, round(side * grid.height)), max(1, round(side * grid.width)))
        yield "fine", MixedLayout.all_fine(small, device)
    for share in SHARES:
        yield "mixed", MixedLayout(grid, edit_cells(share, "scattered", *grid.coarse().shape).to(device))


def prepare(bench: Bench, adapter: Any, case: Case) -> EditState:
    call = inspect.signature(type(bench.pipe).__call__).bind(bench.pipe, **bench.arguments(case))
    call.apply_defaults()
    return adapter.prepare(bench.pipe, {k: v for k, v in call.arguments.items() if k != "self"}, SpecEditConfig())


def transformer_steps(bench: Bench, record: Any, budget: Any) -> int:
    """Time the first size and batch of every model and execution; return how many sequences are left."""
    return sum(model_steps(model, bench, record, budget) for model in bench.args.model)


def model_steps(model: str, bench: Bench, record: Any, budget: Any) -> int:
    args, left = bench.args, 0
    pipe, adapter = bench.load(model), bench.adapter()
    if adapter is None:
        print(f"{model}: skipped, specedit.install does not support {type(pipe).__name__}")
        return 0
    (height, width), batch = args.size[0], args.batch[0]
    with real_models.conditioned_small(height * width) if args.tiny else nullcontext():
        first = Case(model, height, width, batch, "eager")
        bench.attend(first)
        adapter.attach(pipe)
        state = prepare(bench, adapter, first)
    for execution in args.execution:
        bench.execute(execution)
        for kind, layout in sequences(state.grid, state.device):
            tokens = state.text_tokens + 2 * layout.tokens
            key = dict(
                model=model, height=height, width=width, batch=batch, execution=execution, layout=kind, tokens=tokens
            )
            if record.has(key, args.retry):
                continue
            if not budget.fits((model, execution)):
                left += 1
                continue
            try:
                seconds = budget.run((model, execution), partial(step, bench, adapter, state, layout))
            except Exception as error:  # as in end_to_end.edits
                record.add("failures", dict(case=key, error=f"{type(error).__name__}: {first_line(error)}"))
                print(f"{key}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
                continue
            median = statistics.median(seconds)
            read = layout.tokens if state.trims_last_block else None
            flops = state.batch * state.branches * transformer_flops(pipe.transformer.config, tokens, None, read)
            record.add(
                "transformer",
                dict(case=key, ms=1e3 * median, spread_ms=1e3 * (max(seconds) - min(seconds)),
                     tflops=flops / median / 1e12),
            )  # fmt: skip
            print(f"{model} {execution} {kind} {tokens} tokens: {1e3 * median:.1f} ms", flush=True)
    adapter.detach(pipe)
    return left


def step(bench: Bench, adapter: Any, state: EditState, layout: MixedLayout) -> list[float]:
    """Seconds of one velocity, with all guidance passes, for every repetition."""
    generator = torch.Generator().manual_seed(0)
    shape = (state.batch, layout.tokens, state.noise.shape[2])
    tokens, reference = (torch.randn(shape, generator=generator).to(state.device) for _ in range(2))
    group = LayoutGroup(list(range(state.batch)), layout, reference, layout, tokens, [0.5])
    run = Run(adapter, bench.pipe, SpecEditConfig(), state)

    def seconds(calls: int) -> float:
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            adapter.velocity(run, group, 0.5)
        bench.synchronize()
        return (time.perf_counter() - began) / calls

    seconds(2)
    return [seconds(CALLS) for _ in range(bench.args.repeat)]

"""What a run shows while it goes, and what it leaves behind: clocks, progress, callback, memory and forward calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..run_report import StageReport

if TYPE_CHECKING:
    from .adapter import LayoutGroup, Run


@dataclass(frozen=True)
class ForwardCall:
    """Equal forward passes of the transformer, or forecasts that stand in for them. Pure data, without a cost.

    stage: its name. tokens: length of each sequence that is computed (text + target + reference), `text` of which are
    text; fractional where samples differ. keys: tokens attended to, where that is more, because the others' keys and
    values come from a cache, or less, on average, because attention skips some. read: tokens whose output the last
    block computes; None: all of them. samples: sequences of a pass. count: how many passes. measured: queries whose
    attention is computed once more, to see where it goes. forecast: operations of forecasting one sequence, which
    computes no tokens.
    """

    stage: str
    tokens: float
    text: float = 0
    keys: float | None = None
    read: int | None = None
    samples: int = 1
    count: int = 1
    forecast: float = 0.0
    measured: int = 0


def step_calls(
    stage: str, texts: Sequence[float], target: int, beside: int, *, samples: int, trims: bool,
    fresh: int | None = None, alone: bool = False, measured: int = 0,
) -> list[ForwardCall]:  # fmt: skip
    """The forward calls of one step, one for each guidance branch.

    Args:
        texts: text tokens of every branch.
        target, beside: tokens of target and references.
        trims: whether the last block computes the target's rows alone.
        fresh: target tokens that are computed with the text, where not all are.
        alone: whether only the target's tokens are computed (or the fresh ones), without text and references.
        measured: target tokens whose attention is measured.
    """
    calls = []
    for text in texts:
        whole = text + target + beside
        if alone:
            own = target if fresh is None else fresh
            call = ForwardCall(stage, own, 0, whole, own if trims else None, samples)
        elif fresh is not None:
            call = ForwardCall(stage, text + fresh, text, whole, fresh if trims else None, samples)
        else:
            call = ForwardCall(stage, whole, text, None, target if trims else None, samples, measured=measured)
        calls.append(call)
    return calls


def with_fixed_reference(calls: Sequence[ForwardCall], beside: int, first: bool) -> list[ForwardCall]:
    """What `step_calls` gives, of a model whose `beside` reference tokens attend to nothing but each other.

    Text and target attend to all keys. The first step of a stage computes the references too, and the others find their
    keys and values.
    """
    made: list[ForwardCall] = []
    for call in calls:
        if call.keys is not None:  # the target alone
            made.append(call)
            continue
        made.append(replace(call, tokens=call.tokens - beside, keys=call.tokens))
        if first:
            made.append(replace(call, tokens=beside, text=0, read=None if call.read is None else 0))
    return made


def prefix_call(stage: str, text: float, beside: int, samples: int) -> ForwardCall:
    """The call that computes text and references of a model where each sees only what comes before it.

    References see each other, and the text behind them sees them too. The few words before the first picture count as
    words behind it, and several pictures as one.
    """
    tokens = text + beside
    return ForwardCall(stage, tokens, text, (beside * beside + text * tokens) / tokens, None, samples)


def stock_calls(
    texts: Sequence[float], target: int, beside: int, steps: int, *, samples: int, fixed_reference: bool,
    prefixes: int | None = None,
) -> list[ForwardCall]:  # fmt: skip
    """The forward calls of the stock pipeline: `steps` of them for each guidance branch, with every token.

    texts, target, beside, samples: as for `step_calls`. fixed_reference: whether the model is one of those that
    `with_fixed_reference` is for. prefixes: None, or for models that `prefix_call` is for, how many steps compute text
    and references too.
    """
    if prefixes is not None:
        alone = step_calls("stock", texts, target, beside, samples=samples, trims=False, alone=True)
        before = [replace(prefix_call("stock", text, beside, samples), count=prefixes) for text in texts]
        return [*before, *(replace(call, count=steps) for call in alone)]
    calls = step_calls("stock", texts, target, beside, samples=samples, trims=False)
    if not fixed_reference:
        return [replace(call, count=steps) for call in calls]
    first, later = (with_fixed_reference(calls, beside, first) for first in (True, False))
    return [*first, *(replace(call, count=steps - 1) for call in later)]


@dataclass
class StageTrace:
    """A stage under way. groups: the samples it runs, whose sequences have `tokens` at first, on the mean. steps: how
    many are done."""

    name: str
    groups: Sequence[LayoutGroup] = ()
    tokens: float = 0
    steps: int = 0

    def start(self, run: Run, groups: Sequence[LayoutGroup]) -> None:
        """Say what the stage runs."""
        self.groups, text, computed = groups, run.state.text_tokens, [group.computed for group in groups]
        total = sum(len(g.rows) * (g.layout.tokens + g.reference_layout.tokens + text) for g in computed)
        self.tokens = total / sum(len(g.rows) for g in computed)

    def report(self, seconds: float) -> StageReport:
        """Its row; `cost` fills in the operations."""
        first = self.groups[0].computed
        return StageReport(
            self.name, first.sigmas[0], first.sigmas[self.steps], self.steps,
            self.tokens, 0.0, seconds, first.cached, first.reused,
        )  # fmt: skip


@dataclass
class Trace:
    """Follows one run.

    pipe: whose `interrupt` ends the run, or None. bar: a progress bar with `update()`, or None. callback: called after
    every step of the main run with the run, its groups, the step of the stage and of the run; or None.

    stages, calls, cache_bytes: what the run leaves behind. Clocks wait for the device, so they are only read between
    stages.
    """

    pipe: Any = None
    bar: Any = None
    callback: Callable[[Run, Sequence[LayoutGroup], int, int], None] | None = None
    device: torch.device | None = None
    stages: list[StageReport] = field(default_factory=list)
    calls: list[ForwardCall] = field(default_factory=list)
    cache_bytes: int = 0  # most that caches held at once
    decoded: float = 1.0  # share of the pictures that the autoencoder decoded
    steps: int = 0  # of the main run
    stage: StageTrace | None = None  # under way

    @property
    def interrupted(self) -> bool:
        """Whether the caller has asked the pipeline to stop."""
        return bool(getattr(self.pipe, "interrupt", False))

    def clock(self) -> float:
        """Seconds, once the device has finished."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A row for work outside the transformer."""
        began = self.clock()
        yield
        self.stages.append(StageReport(name, None, None, 0, 0, 0.0, self.clock() - began))

    @contextmanager
    def running(self, name: str) -> Iterator[StageTrace]:
        """A row for a stage of the transformer."""
        began, self.stage = self.clock(), StageTrace(name)
        yield self.stage
        self.stages.append(self.stage.report(self.clock() - began))

    def after_step(self, run: Run, groups: Sequence[LayoutGroup], i: int, *, draft: bool = False) -> None:
        """Note that every group has taken step `i` of its stage. The caller's callback does not hear of the draft."""
        if self.stage is not None:
            self.stage.steps += 1
        if self.bar is not None:
            self.bar.update()
        if draft:
            return
        self.cache_bytes = max(self.cache_bytes, sum(group.computed.cache_bytes for group in groups))
        run.set_current_timestep(groups[0].sigmas[i])
        if self.callback is not None:
            self.callback(run, groups, i, self.steps)
        self.steps += 1

"""Time a pipeline of benchmarks/real_models.py: stock, or with SpecEdit on an edit of a given share."""

from __future__ import annotations

import argparse
import ast
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch

import specedit
from benchmarks import real_models
from specedit.config import STOCK_STEPS
from specedit.method import verify
from specedit.models import adapter_of

# Attention backends of diffusers; those that the machine lacks are skipped.
BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")


@dataclass(frozen=True)
class Case:
    """One configuration to measure. `preset` None is the stock pipeline, without an edit share."""

    model: str
    height: int
    width: int
    batch: int
    execution: str
    preset: str | None = None
    restore: str | None = None
    share: float | None = None
    shape: str | None = None
    changes: str = ""  # further fields of the configuration, for `fields`

    @property
    def setting(self) -> tuple:
        return self.model, self.height, self.width, self.batch

    def __str__(self) -> str:
        what = f"{self.preset} {self.restore} {self.share:.0%} {self.shape}" if self.preset else "stock"
        what = f"{what} {self.changes}".strip()
        return f"{self.model} {self.height}x{self.width} batch {self.batch} {self.execution} {what}"


def fields(changes: str) -> dict[str, Any]:
    """Fields of a configuration from "name=value name=value", where values are Python literals without spaces.

    Raises:
        ValueError: any other text.
    """
    found = {}
    for part in changes.split():
        name, equals, value = part.partition("=")
        try:
            if not equals:
                raise ValueError
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"changes: expected name=value with a Python value, got {part!r}") from None
    return found


def edit_cells(share: float, shape: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """(rows, columns) bool with round(share * rows * columns) cells: nearest to a point ("blob"), or random."""
    rng = torch.Generator().manual_seed(seed)
    if shape == "blob":
        centre = 0.3 + 0.4 * torch.rand(2, generator=rng)
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        order = ((y - centre[0] * rows) ** 2 + (x - centre[1] * columns) ** 2).flatten().argsort(stable=True)
    else:
        order = torch.randperm(rows * columns, generator=rng)
    cells = torch.zeros(rows * columns, dtype=torch.bool)
    cells[order[: round(share * rows * columns)]] = True
    return cells.view(rows, columns)


@contextmanager
def found(share: float, shape: str) -> Iterator[None]:
    """Verify the draft as usual (the coarse stage without one), but then take `share` of the cells as edited.

    Every sample of a batch has its own mask.
    """
    find, find_again, ready = verify.verify_draft, verify.verify_coarse, {}

    def chosen(score: Any, edited: torch.Tensor) -> tuple:
        if edited.shape not in ready:  # made by the warm-up call, outside the timed ones
            masks = [edit_cells(share, shape, *edited.shape[1:], seed) for seed in range(len(edited))]
            ready[edited.shape] = torch.stack(masks).to(edited.device)
        return score, ready[edited.shape]

    def verify_draft(*args: Any) -> tuple:
        return chosen(*find(*args))

    def verify_coarse(run: Any, *args: Any) -> tuple:
        score, edited = find_again(run, *args)
        if run.config.uses_draft:  # it takes its time, and finds nothing more
            return score, torch.zeros_like(edited)
        return chosen(score, edited)

    with patch.object(verify, "verify_draft", verify_draft), patch.object(verify, "verify_coarse", verify_coarse):
        yield


class Bench:
    """The loaded pipeline and its current set-up."""

    def __init__(self, args: argparse.Namespace, backends: list[dict]):
        self.args, self.backends = args, backends
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.pipe = None
        self.execution = "eager"
        self.given: tuple[tuple, dict] | None = None

    def load(self, model: str) -> Any:
        if model != self.model:
            self.model = self.pipe = self.given = None  # two models may not fit in memory
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            self.pipe, self.model = real_models.MODELS[model](self.device, dtype, self.args.tiny), model
            self.execution = "eager"
        return self.pipe

    def adapter(self) -> Any:
        """The adapter that specedit.install would use, or None."""
        return adapter_of(self.pipe)

    def arguments(self, case: Case) -> dict[str, Any]:
        if self.given is None or self.given[0] != case.setting:
            self.given = case.setting, real_models.arguments(self.pipe, case.height, case.width, case.batch)
        return self.given[1]

    @property
    def stock_steps(self) -> int:
        """Steps of the stock pipeline that SpecEdit is compared with."""
        return int(getattr(self.args, "stock_steps", STOCK_STEPS))

    def execute(self, how: str) -> None:
        if how == self.execution:
            return
        if how == "compiled":
            # Every stage has its own lengths and arguments. The limit's name depends on torch's version.
            limits = ("recompile_limit", "cache_size_limit")
            setattr(torch._dynamo.config, next(n for n in limits if hasattr(torch._dynamo.config, n)), 64)
            # Tiny runs test the harness, for which tracing is enough.
            self.pipe.transformer.compile_repeated_blocks(**(dict(backend="eager") if self.args.tiny else {}))
        else:
            for module in self.pipe.transformer.modules():
                module._compiled_call_impl = None
        self.execution = how

    def call(self, case: Case, **more: Any) -> float:
        """Seconds of one call."""
        generator = torch.Generator(self.device).manual_seed(0)
        given = self.arguments(case)
        self.synchronize()
        began = time.perf_counter()
        self.pipe(**given, **more, generator=generator)
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def attend(self, case: Case) -> str:
        """Set the fastest attention backend, timed over a few eager stock steps."""
        known = next((b for b in self.backends if b["setting"] == list(case.setting)), None)
        if known is None:
            self.execute("eager")
            seconds: dict[str, float | str] = {}
            for name in BACKENDS if self.device == "cuda" else BACKENDS[:1]:
                try:
                    self.pipe.transformer.set_attention_backend(name)
                    self.call(case, num_inference_steps=2, output_type="latent")
                    seconds[name] = self.call(case, num_inference_steps=4, output_type="latent")
                except Exception as error:  # each library raises its own error when it is missing
                    seconds[name] = first_line(error)
            timed = {name: s for name, s in seconds.items() if isinstance(s, float)}
            if not timed:
                raise RuntimeError(f"no attention backend ran: {seconds}")
            known = dict(setting=list(case.setting), seconds=seconds, fastest=min(timed, key=timed.get))
            self.backends.append(known)
        self.pipe.transformer.set_attention_backend(known["fastest"])
        return known["fastest"]

    def measure(self, case: Case) -> dict[str, Any]:
        """Seconds of every repetition, peak memory, and fields of the last report."""
        specedit.uninstall(self.pipe)
        attention = self.attend(case)
        self.execute(case.execution)
        stage_seconds: list[list[float]] = []
        report = None
        finding = nullcontext()
        if case.preset is not None:
            specedit.install(self.pipe, case.preset, restore=case.restore, **fields(case.changes))
            finding = found(case.share, case.shape)
        with finding:
            # Two stock steps warm up all of them; SpecEdit's stages differ, so run them all.
            first = self.call(case, **({} if case.preset else dict(num_inference_steps=2)))
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = []
            for _ in range(self.args.repeat):
                taken.append(self.call(case, **({} if case.preset else dict(num_inference_steps=self.stock_steps))))
                if case.preset is not None:
                    report = specedit.report(self.pipe)
                    stage_seconds.append([stage.seconds for stage in report.stages])
                if sum(taken) > self.args.enough:
                    break
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        done = dict(case=asdict(case), attention=attention, seconds=taken, first_seconds=first, peak_memory=peak)
        if case.preset is None and self.stock_steps != STOCK_STEPS:
            done["steps"] = self.stock_steps
        if report is not None:
            stages = [
                dict(name=s.name, steps=s.steps, tokens=s.tokens, flops=s.flops, seconds=statistics.median(seconds))
                for s, seconds in zip(report.stages, zip(*stage_seconds))
            ]
            done |= dict(
                edit_fraction=report.edit_fraction, expand_fraction=report.expand_fraction,
                flops_ratio=report.flops_ratio_50, stages=stages,
            )  # fmt: skip
        return done


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""End-to-end timing of an embedded editor: stock against every preset and both restores, in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from tqdm.auto import tqdm

from . import install, report, uninstall
from .config import CHOICES, presets
from .install import STOCK_STEPS
from .micro import arguments, load, scenes

SEED = 1


def presets_against_stock(size: int, repeat: int = 1, seed: int = SEED, model: str = "kontext") -> list[dict[str, Any]]:
    """Rows of an `end_to_end` result file; medians of `repeat` calls, one short call before them to warm up.

    `peak_memory` is the most bytes that torch held on the GPU at once. On a CPU it is None: a process can neither be
    asked for the peak of one call, nor be told to forget that of the calls before.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    case = scenes.sample(seed, size)
    call = dict(image=case.source, prompt=case.prompt, **arguments(case.source, model))

    def measure(**more: Any) -> tuple[list[float], int | None]:
        """Seconds of every call, and the peak of all."""
        taken = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeat):
            began = time.perf_counter()
            pipe(**call, **more, generator=torch.Generator().manual_seed(seed))
            taken.append(time.perf_counter() - began)
        return taken, torch.cuda.max_memory_allocated() if device == "cuda" else None

    runs = [(preset, restore) for preset in presets if "lightning" not in preset for restore in CHOICES["restore"]]
    pipe(**call, num_inference_steps=2)
    with tqdm(total=1 + len(runs), desc="bench") as bar:
        stock, peak_stock = measure(num_inference_steps=STOCK_STEPS)
        bar.update()
        rows = []
        for preset, restore in runs:
            install(pipe, preset, restore=restore)
            pipe(**call, num_inference_steps=2)
            taken, peak = measure()
            done = report(pipe)
            uninstall(pipe)
            rows.append(
                dict(
                    model=f"micro-{model}", preset=preset, restore=restore, edit_fraction=done.edit_fraction,
                    height=size, width=size, baseline=f"stock {STOCK_STEPS} steps",
                    seconds_stock=statistics.median(stock),
                    seconds=statistics.median(taken), speedup=statistics.median(stock) / statistics.median(taken),
                    flops_ratio=done.flops_ratio, spread=max(taken) - min(taken),
                    peak_memory_stock=peak_stock, peak_memory=peak,
                    stages=[dict(name=s.name, steps=s.steps, tokens=s.tokens, flops=s.flops, seconds=s.seconds)
                            for s in done.stages],
                )
            )  # fmt: skip
            bar.update()
    return rows

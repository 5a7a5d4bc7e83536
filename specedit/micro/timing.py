"""End-to-end timing of an embedded editor: stock against every preset with both restores."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from tqdm.auto import tqdm

from ..api.installing import install, report, uninstall
from ..config import STANDARD_PRESETS, STANDARD_RESTORES, STOCK_STEPS
from ..run_report import RunReport
from . import arguments, load, scenes

SEED = 1


def presets_against_stock(
    size: int, repeat: int = 3, seed: int = SEED, model: str = "kontext", **settings: Any
) -> list[dict[str, Any]]:
    """Rows of an `end_to_end` result file: medians of `repeat` calls, after a short warm-up call.

    Stock and presets take turns, so that a drift of the machine's speed affects all alike. Ratios are to stock's 50
    steps. `peak_memory` is torch's peak on the GPU in bytes; None on a CPU, where the peak of one call is unknown.

    Args:
        settings: fields of SpecEditConfig that override every preset.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    case = scenes.sample(seed, size)
    call = dict(image=case.source, prompt=case.prompt, **arguments(case.source, model))

    def measure(**more: Any) -> tuple[float, int]:
        """Seconds and peak memory of one call; 0 bytes on a CPU."""
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        pipe(**call, **more, generator=torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - began
        return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0

    runs = [(preset, restore) for preset in STANDARD_PRESETS for restore in STANDARD_RESTORES]
    stock: list[tuple[float, int]] = []
    taken: dict[tuple[str, str], list[tuple[float, int, RunReport]]] = {run: [] for run in runs}
    with tqdm(total=repeat * (1 + len(runs)), desc="bench") as bar:
        pipe(**call, num_inference_steps=2)
        for turn in range(repeat):
            stock.append(measure(num_inference_steps=STOCK_STEPS))
            bar.update()
            for preset, restore in runs:
                install(pipe, preset, restore=restore, **settings)
                if turn == 0:
                    pipe(**call, num_inference_steps=2)
                taken[preset, restore].append((*measure(), report(pipe)))
                uninstall(pipe)
                bar.update()

    seconds_stock = statistics.median(seconds for seconds, _ in stock)
    rows = []
    for (preset, restore), calls in taken.items():
        times = [seconds for seconds, _, _ in calls]
        middle = statistics.median_low(times)  # an actual call, so that its stages belong to this row
        done = calls[times.index(middle)][2]
        rows.append(
            dict(
                model=f"micro-{model}", preset=preset, restore=restore, edit_fraction=done.edit_fraction,
                height=size, width=size, baseline=f"stock {STOCK_STEPS} steps",
                seconds_stock=seconds_stock, seconds=middle,
                speedup=seconds_stock / middle,
                flops_ratio=done.flops_ratio_50, spread=max(times) - min(times),
                peak_memory_stock=max(peak for _, peak in stock) or None,
                peak_memory=max(peak for _, peak, _ in calls) or None,
                stages=[dict(name=s.name, steps=s.steps, tokens=s.tokens, flops=s.flops, seconds=s.seconds)
                        for s in done.stages],
            )
        )  # fmt: skip
    return rows

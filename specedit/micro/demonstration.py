"""The demo: one photograph, edited by an embedded editor twice, stock and with SpecEdit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ..api.installing import disabled, install, uninstall
from ..api.installing import report as report_of
from ..api.sizes import size_for
from ..config import STOCK_STEPS
from ..report_comparison import where_it_looked
from ..run_report import RunReport
from . import arguments, load, scenes
from .evaluation import score, stock_flops

NAMES = {"kontext": "FLUX-Kontext", "qwen": "Qwen-Image-Edit"}
SEED = 1  # an added object on a photograph that training never saw


@dataclass
class Result:
    """Both edits of one task, and their cost."""

    case: scenes.Case
    stock: Image.Image
    stock_seconds: float
    stock_flops: float
    edit: Image.Image
    run: RunReport
    model: str = "kontext"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: a heading, then one line per quantity, stock next to SpecEdit."""
        a, b = score(self.stock, self.case), score(self.edit, self.case)
        same = [self._untouched(image) for image in (self.stock, self.edit)]
        gain = f"{self.stock_seconds / self.run.seconds:.1f}x"
        return [
            ("", "stock", "SpecEdit", ""),
            ("model evaluations", f"{STOCK_STEPS}", f"{self.run.nfe} + {self.run.draft_steps} draft", ""),
            ("seconds", f"{self.stock_seconds:.2f}", f"{self.run.seconds:.2f}", gain),
            (
                "TFLOPs",
                f"{self.stock_flops / 1e12:.3f}",
                f"{self.run.flops / 1e12:.3f}",
                f"{self.run.flops_ratio_50:.1f}x",
            ),
            ("edited region, dB from the exact result", f"{a['edit_psnr']:.1f}", f"{b['edit_psnr']:.1f}", ""),
            ("untouched region, dB from the input", f"{a['keep_psnr']:.1f}", f"{b['keep_psnr']:.1f}", ""),
            ("untouched pixels equal to the input", f"{same[0]:.0%}", f"{same[1]:.0%}", ""),
        ]

    def _untouched(self, image: Image.Image) -> float:
        """Share of the pixels outside the edit mask that are the input's own, bit for bit."""
        equal = (np.asarray(image) == np.asarray(self.case.source)).all(-1)
        return float(equal[~self.case.mask].mean())

    def table(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        )

    def save_figure(self, path: Path) -> None:
        """Input, both edits and the edited cells, side by side."""
        figure = Figure(figsize=(15, 4.7), layout="constrained")
        axes = figure.subplots(1, 4)
        gain, fewer = self.stock_seconds / self.run.seconds, self.run.flops_ratio_50
        kept = ", unedited pixels kept" if self.run.config.keep_pixels else ""
        titles = (
            "input",
            f"stock {NAMES[self.model]} pipeline\n{STOCK_STEPS} steps, {self.stock_seconds:.1f} s",
            f"SpecEdit, the same call{kept}\n{self.run.nfe} steps, {self.run.seconds:.1f} s, {gain:.1f}x faster",
            f"edited cells (bright): {self.run.edit_fraction:.0%},\n{fewer:.1f}x fewer FLOPs",
        )
        for axis, image, title in zip(
            axes, (self.case.source, self.stock, self.edit, where_it_looked(self.edit, self.run)), titles
        ):
            axis.imshow(image)
            axis.set_title(title, fontsize=12)
            axis.axis("off")
        figure.suptitle(f"“{self.case.prompt}”", fontsize=14)
        figure.savefig(path, dpi=80)


def run(size: int = 512, preset: str = "turbo", seed: int = SEED, model: str = "kontext", **overrides: Any) -> Result:
    """Edit one task with the stock pipeline and with SpecEdit. `overrides`: fields of SpecEditConfig."""
    pipe = load(model)
    case = scenes.sample(seed, size)
    call = dict(image=case.source, prompt=case.prompt, **arguments(case.source, model) | size_for(pipe, case.source))

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    install(pipe, preset, **overrides)  # first: what does not fit is refused before any work
    with disabled(pipe):
        pipe(**call, num_inference_steps=2, generator=generator())  # warm up
        pipe.set_progress_bar_config(desc=f"stock, {STOCK_STEPS} steps")
        began = time.perf_counter()
        stock = pipe(**call, num_inference_steps=STOCK_STEPS, generator=generator()).images[0]
        stock_seconds = time.perf_counter() - began
    pipe.set_progress_bar_config(desc=f"SpecEdit, {preset}")
    edit = pipe(**call, generator=generator()).images[0]
    done = report_of(pipe)
    uninstall(pipe)
    return Result(case, stock, stock_seconds, stock_flops(pipe, case, STOCK_STEPS), edit, done, model)

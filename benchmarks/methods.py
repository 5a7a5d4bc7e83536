"""Every method that the paper compares with, on the same tasks, editors and accounting.

    python -m benchmarks.methods --model kontext --cases 64 --size 512 --out benchmarks/results/methods-512.json
    python -m benchmarks.methods --plugin mine.py --only stock-28 "mine default" --out mine.json

Stock at several step counts, each method at its published settings, the temporal caches alone, SpecEdit's presets, and
single switches of it. All variants take turns on every few tasks in one run. --resume goes on with the file, also with
more tasks. --plugin adds the methods that a file registers.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.scores import Scores, editor, fitting, options, some, tasks, why_unfit
from specedit import micro, uninstall
from specedit.api.installing import install
from specedit.cli.methods import import_plugin
from specedit.config import STANDARD_PRESETS, STANDARD_RESTORES, STOCK_STEPS, presets
from specedit.registry import forecasts, methods

STOCK = (50, 28, 10, 8, 4, 2, 1)
OWN_RESTORE = ("ultra", "few-8", "few-4")  # presets that name one
INTERVALS = (3, 5, 7)  # of temporal caches alone: about so many times fewer FLOPs
# One switch each, on the cheapest preset.
IDEAS: dict[str, dict[str, Any]] = {
    "no draft": {"draft_steps": 0},
    "locked cached": {"locked": "cached"},
    "locked reference": {"locked": "reference"},
    "reference_keep": {"reference_keep": 0.15},
    "pixel restore": {"restore": "pixels"},
    "reference_refresh 4": {"reference_refresh": 4},
}


def preset_rows() -> dict[str, tuple[str, str]]:
    """Preset and restore of every row with SpecEdit's own settings, by name."""
    pairs = [(preset, restore) for preset in STANDARD_PRESETS for restore in STANDARD_RESTORES]
    pairs += [(preset, presets[preset].restore) for preset in OWN_RESTORE]
    return {f"{preset}-{restore}": (preset, restore) for preset, restore in pairs}


def variants() -> dict[str, dict[str, Any]]:
    """Settings by name: {"steps": n} for stock, else fields of a configuration; "group" says what kind it is."""
    every: dict[str, dict[str, Any]] = {f"stock-{n}": {"group": "stock", "steps": n} for n in STOCK}
    for name in methods:
        if name != "steps":
            for setting in methods[name].published or (None,):
                options = methods[name]() if setting is None else methods[name].at(setting)
                every[f"{name} {setting or 'default'}"] = {"group": "method", "fields": {"method": options}}
    for name in forecasts:
        for interval in INTERVALS:
            fields = {"forecast": name, "forecast_interval": interval, "steps": (0, 0, STOCK_STEPS)}
            every[f"{name} N={interval}"] = {"group": "cache", "fields": fields}
    for name, (preset, restore) in preset_rows().items():
        every[name] = {"group": "specedit", "preset": preset, "fields": {"restore": restore}}
    for name, fields in IDEAS.items():
        every[name] = {"group": "idea", "preset": "turbo", "fields": {"restore": "reference"} | fields}
    return every


def described(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a result file shows them."""
    fields = {name: str(value) for name, value in settings.get("fields", {}).items()}
    return {name: value for name, value in settings.items() if name != "fields"} | {"fields": fields}


def set_up(pipe: Any, settings: dict[str, Any]) -> None:
    """Install what a variant names; stock leaves the pipeline as it is."""
    if settings["group"] != "stock":
        install(pipe, settings.get("preset"), **settings["fields"])


def unfit(pipe: Any, settings: dict[str, Any]) -> str | None:
    """Why this editor cannot run a variant, or None."""
    return None if settings["group"] == "stock" else why_unfit(pipe, settings.get("preset"), **settings["fields"])


def score(scores: Scores, pipe: Any, name: str, todo: list[micro.scenes.Case], settings: dict[str, Any]) -> None:
    """Run one variant on some tasks."""
    set_up(pipe, settings)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    scored = micro.evaluate(pipe, todo, settings.get("steps"))["cases"]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        scored = [case | {"peak_memory": peak} for case in scored]
    scores.add(pipe, name, scored, **described(settings))
    uninstall(pipe)


def parser() -> argparse.ArgumentParser:
    made = options(__doc__)
    made.add_argument("--plugin", type=Path, help="Python file that registers methods, which join the table")
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.plugin is not None:
        import_plugin(args.plugin)
    chosen = some(variants(), args.only)
    scores = Scores.asked("methods", args, tasks(args))
    pipe = editor(args.model)
    chosen = fitting(chosen, partial(unfit, pipe), named=args.only is not None)
    for name, todo in scores.turns(chosen):
        score(scores, pipe, name, todo, chosen[name])


if __name__ == "__main__":
    main()

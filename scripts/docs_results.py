"""Result files, and formatting of their figures."""

import json
from pathlib import Path

from specedit.config import STOCK_STEPS
from specedit.cost.flops import MODELS
from specedit.evaluation.results import fingerprint
from specedit.micro.editors import editor_named
from specedit.micro.loading import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SETTING = ("model", "height", "width", "batch", "preset", "restore", "edit_fraction", "shape")


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def default_steps(model: str) -> int:
    """Default steps of a stock pipeline: a real model, or an embedded editor with or without "micro-"."""
    return MODELS[model].default_steps if model in MODELS else editor_named(model.removeprefix("micro-")).default_steps


def to_default(model: str, ratio: float) -> str:
    """A FLOPs ratio to 50 stock steps, converted to the pipeline's default steps."""
    return f"{ratio * default_steps(model) / STOCK_STEPS:.2f}"


def edited_by(result: dict) -> str:
    """The embedded editor of a result file; early files, all of kontext, do not say."""
    return result.get("of", {}).get("model", "kontext")


OPTIONS = {"specedit ": "--json", "python -m benchmarks.": "--out", "python benchmarks/": "--out"}


def typed(command: str, name: str) -> str:
    """The command with the option that names its result file, which the file leaves out."""
    option = next((option for start, option in OPTIONS.items() if command.startswith(start)), None)
    if option is None or "--out" in command or "--json" in command:
        return command
    return f"{command} {option} benchmarks/results/{name}"


def age(result: dict) -> str:
    """A sentence if the embedded editor's weights have changed since the measurement, else nothing."""
    measured, folder = result.get("of", {}), WEIGHTS / result.get("of", {}).get("model", "")
    now = {fingerprint(folder), fingerprint(folder / "vae")}  # verification reads the decoder only
    return "" if measured.get("weights") in {None, *now} else " The editor's weights have changed since."


def machines(result: dict) -> list[dict]:
    """All machines that measured the file."""
    return result.get("machines", [result["machine"]])


def where(machine: dict) -> str:
    """The GPU, or the CPU and that there is none."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, no GPU"


def source(result: dict, name: str) -> str:
    """The note of `docs_cases.compared`, every kind of machine, and the command."""
    every = [f"{where(m)}; torch {m['torch']}, diffusers {m['diffusers']}, {m['date']}" for m in machines(result)]
    note = f"\n\n{result['note']}" if result.get("note") else ""
    command = result["command"]
    if "; python -m benchmarks." in command:  # of files that were merged
        parts = "` and `".join(dict.fromkeys(command.split("; ")))
        wrote = f"`{parts}`, each with its own `--out` and joined by `python -m benchmarks.merge`,"
    else:
        wrote = f"`{typed(command, name)}`"
    return (
        f"{note}\n\nMeasured on {'; and on '.join(dict.fromkeys(every))}. "
        f"{wrote} wrote `benchmarks/results/{name}`.{age(result)}"
    )


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def against_faster(rows: list[dict]) -> list[dict]:
    """For every setting, the row with the fastest baseline and the fastest SpecEdit, in the file's order."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (*(row[name] for name in SETTING), row.get("changes", ""))
        old = best.get(key)
        if old is None or (row["seconds_stock"], row["seconds"]) < (old["seconds_stock"], old["seconds"]):
            best[key] = row
    return list(best.values())

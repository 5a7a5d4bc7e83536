"""Result files, and how their figures are set in a page."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SETTING = ("model", "height", "width", "batch", "preset", "restore", "edit_fraction", "shape")


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def source(result: dict, name: str) -> str:
    m = result["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} threads, no GPU"
    return (
        f"\n\nMeasured on {where}; torch {m['torch']}, diffusers {m['diffusers']}, {m['date']}. "
        f"`{result['command']}` wrote `benchmarks/results/{name}`."
    )


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def against_faster(rows: list[dict]) -> list[dict]:
    """Of every setting the row with the faster baseline and the faster way of running SpecEdit, in the file's order."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (*(row[name] for name in SETTING), row.get("changes", ""))
        old = best.get(key)
        if old is None or (row["seconds_stock"], row["seconds"]) < (old["seconds_stock"], old["seconds"]):
            best[key] = row
    return list(best.values())

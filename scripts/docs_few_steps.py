"""The table and figure of settings for few steps."""

from pathlib import Path
from string import ascii_lowercase

from docs_cases import average, clock_ratio, compared
from docs_figures import over_cost
from docs_methods import cases_of
from docs_quality import SMALL
from docs_results import number, source, table
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SCORES = {"success": False, "texture distance": True}  # whether it is of texture tasks, or of the others


def few(name: str) -> str:
    """Settings of few steps against stock with as many."""
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows = by_variant(result)
    written = [_row(name, cases, rows) for name, cases in rows.items()]
    header = ["setting", "success", "edit dB", "keep dB", "texture", "material", "recall"]
    header += ["FLOPs vs as many", "small edits", "clock vs as many", "small edits"]
    small = f"{len(result['rows'][0]['cases'])} tasks. Small edits change at most {SMALL:.0%} of the picture."
    return f"{small}\n\n{table(header, written)}{source(result, name)}"


def by_variant(result: dict) -> dict[str, list[dict]]:
    """Every variant's tasks."""
    return {row["variant"]: row["cases"] for row in result["rows"]}


def _row(name: str, cases: list[dict], rows: dict[str, list[dict]]) -> list[str]:
    steps, colon, _ = name.partition(":")
    own = rows.get(f"stock-{steps}", []) if colon else cases
    small = [[case for case in some if case["mask_share"] <= SMALL] for some in (own, cases)]
    ratios = [_saved(*two) for two in ((own, cases), small)]
    clocks = [clock_ratio(*two) for two in ((own, cases), small)]
    scores = {"success": ".0%", "edit_psnr": ".1f", "keep_psnr": ".1f", "texture_distance": ".2f", "material": ".0%"}
    shown = [number(average(cases, key), form) for key, form in (scores | {"recall": ".0%"}).items()]
    return [name, *shown, *(number(ratio, ".2f") for ratio in ratios + clocks)]


def _saved(own: list[dict], cases: list[dict]) -> float | None:
    """How many times fewer operations; None without tasks."""
    return average(own, "flops") / average(cases, "flops") if own and cases else None


def pareto(name: str, path: Path) -> None:
    """Success and texture distance over FLOPs: stock with every number of steps, and the settings of each number.

    Both over the tasks that all variants share. A setting has one letter at every number of steps.
    """
    result = compared(name)
    if result is None:
        return
    rows = by_variant(result)
    settings = list(dict.fromkeys(name.partition(": ")[2] for name in rows if ":" in name))
    letters = dict(zip(settings, ascii_lowercase, strict=False))
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, (label, texture) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for colour, (group, points) in enumerate(grouped(rows, label.replace(" ", "_"), texture).items()):
            x, y, names = zip(*points, strict=True)
            if group == "stock":
                axis.plot(x, y, marker="s", color="C0", label=group)
                for at in points:
                    axis.annotate(at[2], at[:2], fontsize=8, xytext=(0, 6), textcoords="offset points")
                continue
            marked = [letters[one.partition(": ")[2]] for one in names]
            for at, letter in zip(zip(x, y, strict=True), marked, strict=True):
                axis.plot(*at, marker=f"${letter}$", color=f"C{colour}", linestyle="")
            axis.plot([], [], marker="o", color=f"C{colour}", linestyle="", label=group)
        axis.set_ylim(0)
        over_cost(axis, label)
        axis.legend(fontsize=8, loc="lower left")
    listed = [Line2D([], [], marker=f"${letters[one]}$", color="black", linestyle="", label=one) for one in settings]
    figure.legend(handles=listed, loc="outside right center", fontsize=8, title="setting")
    figure.savefig(path, dpi=90)


def grouped(rows: dict[str, list[dict]], key: str, texture: bool) -> dict[str, list[tuple[float, float, str]]]:
    """(TFLOPs, score, variant) by the cost, of stock and of the settings of each number of steps."""
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for name, cases in rows.items():
        own = cases_of({"cases": cases}, texture=texture)
        if (value := average(own, key)) is None:
            continue
        steps, colon, _ = name.partition(":")
        group = f"SpecEdit, {steps} steps" if colon else "stock"
        groups.setdefault(group, []).append((average(own, "flops") / 1e12, value, name))
    return {group: sorted(points) for group, points in groups.items()}

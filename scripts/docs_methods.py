"""The table and figure of all methods."""

from collections.abc import Callable
from pathlib import Path

from docs_cases import MOST, average, compared, mean_seconds
from docs_figures import over_cost
from docs_paper import FRESCO_ABLATIONS, REPORTED
from docs_quality import SMALL
from docs_results import default_steps, edited_by, number, source, table
from matplotlib.figure import Figure

from specedit.config import STOCK_STEPS

GROUPS = {"stock": "s", "method": "o", "cache": "v", "specedit": "^", "idea": "*"}


def cases_of(row: dict, *, texture: bool, largest: float = 1.0) -> list[dict]:
    """The row's tasks of the old kinds, or of the texture kind, that change at most a share of the picture."""
    return [
        case for case in row["cases"] if (case["kind"] == "texture") == texture and case.get("mask_share", 0) <= largest
    ]


def methods(name: str, enough: float = MOST) -> str:
    """One row a variant: both metrics, what it costs, and what is left beside stock with as many steps.

    enough: the share of the tasks that a variant must have run, else it is only named.
    """
    result = compared(name, enough)
    if result is None:
        return "*not measured yet*"
    steps = default_steps(edited_by(result))
    stock = {row["variant"]: row for row in result["rows"] if row["group"] == "stock"}
    seconds, timed, machine = mean_seconds(result, enough=0.0)
    on_gpu = any(row["mean"].get("peak_memory") for row in result["rows"])
    rows = [_row(row, stock, steps, seconds, on_gpu) for row in _ordered(result["rows"])]
    header = ["variant", "success", "edit dB", "keep dB", "texture distance", "material", "TFLOPs"]
    header += [f"FLOPs ratio to {n}" for n in dict.fromkeys((STOCK_STEPS, steps))]
    header += ["seconds", f"clock ratio to {steps}", "FLOPs ratio to stock with as many steps"]
    header += ["peak memory, MB" if on_gpu else "kept by caches, MB", "its paper"]
    partly = seconds and timed < len(result["rows"][0]["cases"])
    notes = f"\n\nSeconds and their ratios are of {timed} tasks{machine}." if machine or partly else ""
    return _tasks(result["rows"][0]) + "\n\n" + table(header, rows) + notes + source(result, name)


def all_methods(name: str) -> str:
    """`methods` with every variant, over the tasks that all of them have run."""
    return methods(name, enough=0.0)


def ablations(name: str) -> str:
    """One row a variant, in the order of its paper's figures."""
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    found = {row["variant"]: row for row in result["rows"]}
    whole = _distances(found["full"]) if "full" in found else {}
    rows = []
    for variant, reward in FRESCO_ABLATIONS.items():
        if variant not in found:
            continue
        plain, texture = (cases_of(found[variant], texture=is_texture) for is_texture in (False, True))
        own = _distances(found[variant])
        farther = sum(own[seed] > distance for seed, distance in whole.items())
        rows.append([
            variant, number(average(plain, "success"), ".0%"), number(average(plain, "edit_psnr"), ".2f"),
            number(average(plain + texture, "keep_psnr"), ".2f"), number(average(texture, "texture_distance"), ".2f"),
            f"{farther} of {len(whole)}" if whole and variant != "full" else "-", f"{reward:.4f}",
        ])  # fmt: skip
    header = ["variant", "success", "edit dB", "keep dB", "texture distance", "textures farther than in full"]
    header += ["its paper's ImageReward, FLUX.1"]
    return _tasks(result["rows"][0]) + "\n\n" + table(header, rows) + source(result, name)


def _distances(row: dict) -> dict[int, float]:
    """Texture distance by the task's seed."""
    return {case["seed"]: case["texture_distance"] for case in cases_of(row, texture=True)}


def _tasks(row: dict) -> str:
    plain, textures = (len(cases_of(row, texture=texture)) for texture in (False, True))
    return f"Tasks: {plain}" + (f", and {textures} of textures." if textures else ".")


def _ordered(rows: list[dict]) -> list[dict]:
    groups = list(GROUPS)
    return sorted(rows, key=lambda row: (groups.index(row["group"]), -row["mean"]["flops"]))


def _row(row: dict, stock: dict[str, dict], steps: int, seconds: dict[str, float | None], on_gpu: bool) -> list[str]:
    """One line of `methods`.

    seconds: means by variant, all of the same tasks. on_gpu: peak memory is shown, else what caches kept, since nobody
    knows the peak of one call on a CPU.
    """
    m, own, default = row["mean"], seconds.get(row["variant"]), seconds.get(f"stock-{steps}")
    plain, texture = cases_of(row, texture=False), cases_of(row, texture=True)
    # Every stock step costs the same, so any number of them tells what 50 take.
    whole = next((r["mean"]["flops"] * STOCK_STEPS / r["steps"] for r in stock.values()), None)
    ratios = [whole and whole * n / STOCK_STEPS / m["flops"] for n in dict.fromkeys((STOCK_STEPS, steps))]
    clock = default / own if default and own else None
    nfe = row.get("nfe")
    alike = whole and nfe and whole * nfe / STOCK_STEPS / m["flops"]
    held = m.get("peak_memory") if on_gpu else row.get("cache_bytes")
    return [
        row["variant"], number(average(plain, "success"), ".0%"), number(average(plain, "edit_psnr"), ".1f"),
        number(average(plain + texture, "keep_psnr"), ".1f"), number(average(texture, "texture_distance"), ".2f"),
        number(average(texture, "material"), ".0%"), f"{m['flops'] / 1e12:.2f}",
        *(number(ratio, ".2f") for ratio in ratios), number(own, ".1f"), number(clock, ".2f"), number(alike, ".2f"),
        number(None if held is None else held / 1e6, ".0f"), REPORTED.get(row["variant"].split()[0].split("-")[0], "-"),
    ]  # fmt: skip


def front(points: list[tuple[float, float, str]], best: Callable) -> list[tuple[float, float, str]]:
    """Of (cost, value, name), those that no cheaper one is as good as; best: min or max of two values."""
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not kept or (best(point[1], kept[-1][1]) == point[1] and point[1] != kept[-1][1]):
            kept.append(point)
    return kept


def pareto(name: str, path: Path) -> None:
    """Success of small edits and texture distance, over FLOPs and over seconds; the best at their cost are named.

    What no task was judged by, and seconds where none were kept, have no panel.
    """
    result = compared(name, MOST)
    if result is None:
        return
    every_case = [case for row in result["rows"] for case in row["cases"]]
    metrics = [
        (key, title, texture)
        for key, title, texture in (("success", "success", False), ("texture_distance", "texture distance", True))
        if any(case.get(key) is not None for case in every_case)
    ]
    timed = any(case.get("seconds") for case in every_case)
    figure = Figure(figsize=(6 * len(metrics), 9 if timed else 4.5), layout="constrained")
    axes = figure.subplots(2 if timed else 1, len(metrics), squeeze=False)
    for column, (key, title, texture) in enumerate(metrics):
        rows = [row | dict(cases=cases_of(row, texture=texture, largest=1.0 if texture else SMALL))
                for row in result["rows"]]  # fmt: skip
        operations = {row["variant"]: average(row["cases"], "flops") for row in rows}
        seconds, count, machine = mean_seconds(result | dict(rows=rows), enough=0.0)
        clock = f"seconds an edit, {count} tasks{machine}"
        for line, (costs, label, scale) in enumerate(
            ((operations, "TFLOPs an edit", 1e12), (seconds, clock, 1))[: len(axes)]
        ):
            axis, every = axes[line][column], []
            for group, marker in GROUPS.items():
                points = sorted(
                    (costs[row["variant"]] / scale, value, row["variant"])
                    for row in rows
                    if row["group"] == group and row["variant"] in costs
                    and (value := average(row["cases"], key)) is not None
                )  # fmt: skip
                if points:
                    x, y, names = zip(*points, strict=True)
                    axis.plot(x, y, marker=marker, linestyle="-" if group == "stock" else "", label=group)
                    every += points
            for at in front(every, best=min if texture else max):
                axis.annotate(at[2], at[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
            axis.set_ylim(0)
            over_cost(axis, title, label)
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)

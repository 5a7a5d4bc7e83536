"""Pictures of what was measured."""

from ast import literal_eval
from pathlib import Path

from docs_cases import compared
from docs_results import against_faster, load
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


def over_cost(axis: Axes, label: str, cost: str = "TFLOPs an edit") -> None:
    """An axis of `label` over a cost. Shares span 0 to 1, so that one task does not look large."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(cost)
    axis.set_ylabel(label)
    if label == "success":
        axis.set_ylim(0, 1)


def pareto(name: str, path: Path) -> None:
    """Success and edit PSNR over FLOPs of every variant, and texture distance if there is one."""
    result = compared(name)
    if result is None:
        return
    panels = [("success", "success"), ("edit_psnr", "edit PSNR, dB"), ("texture_distance", "texture distance")]
    panels = [panel for panel in panels if all(panel[0] in row["mean"] for row in result["rows"])]
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels):
        for family, marker in (("stock", "s"), ("full", "o"), ("reference", "^")):
            rows = [r for r in result["rows"] if r["variant"].startswith(family) or r["variant"].endswith(family)]
            if not rows:
                continue
            rows.sort(key=lambda r: r["mean"]["flops"])
            x = [r["mean"]["flops"] / 1e12 for r in rows]
            axis.plot(x, [r["mean"][key] for r in rows], marker=marker, label=family)
            for r, at in zip(rows, x):
                axis.annotate(r["variant"].split("-")[-1 if family == "stock" else 0], (at, r["mean"][key]), fontsize=8)
        over_cost(axis, label)
        axis.legend()
    figure.savefig(path, dpi=90)


# Panels of the sweep: group, field on the axis, and whether the starting point is on the curve.
CURVES = (
    ("boundaries", "boundaries", True), ("boundaries (full)", "boundaries", False),
    ("threshold (draft)", "threshold", True), ("threshold (full)", "threshold", False), ("dilation", "dilation", True),
    ("draft_steps", "draft_steps", True), ("uniform_stride", "uniform_stride", True),
    ("reference_refresh", "reference_refresh", False), ("reference_keep", "reference_keep", False),
)  # fmt: skip


def sweep_curves(name: str, path: Path) -> None:
    """Edit PSNR and texture distance over one setting at a time; a dotted line marks the preset's value."""
    from specedit.config import resolve

    result = compared(name)
    rows, preset, start = result["rows"], resolve("turbo"), resolve(**_plain(result["base"]))
    (base,) = [row for row in rows if row["group"] == "base"]
    curves = [curve for curve in CURVES if any(row["group"] == curve[0] for row in rows)]
    lines = -(-len(curves) // 3)
    figure = Figure(figsize=(12, 3 * lines), layout="constrained")
    axes = list(figure.subplots(lines, 3, squeeze=False).flat)
    for unused in axes[len(curves) :]:
        unused.remove()
    for axis, (group, field, through) in zip(axes, curves):
        points = [(_first(literal_eval(r["change"][field])), r["mean"]) for r in rows if r["group"] == group]
        if through:
            points.append((_first(getattr(start, field)), base["mean"]))
            axis.axvline(_first(getattr(preset, field)), color="grey", linestyle=":", linewidth=1)
        points.sort(key=lambda point: point[0])
        x = [value for value, _ in points]
        axis.plot(x, [mean["edit_psnr"] for _, mean in points], marker="o", color="C0")
        axis.set_ylim(base["mean"]["edit_psnr"] - 3, base["mean"]["edit_psnr"] + 2)  # chance looks small
        axis.set_ylabel("edit PSNR, dB", color="C0")
        axis.set_xlabel(group.replace("boundaries", "sigma at which the coarse stage ends"))
        other = axis.twinx()
        other.plot(x, [mean["texture_distance"] for _, mean in points], marker="^", color="C1")
        other.set_ylim(0, 2 * base["mean"]["texture_distance"])
        other.set_ylabel("texture distance", color="C1")
    figure.savefig(path, dpi=90)


def _plain(base: dict) -> dict:
    """`base` as arguments of `resolve`."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in base.items()}
    return {"value": fields.pop("preset"), **fields}


def _first(value: float | tuple) -> float:
    return value[0] if isinstance(value, tuple) else value


def forecast_pareto(name: str, path: Path) -> None:
    """Success, edit PSNR and texture distance over FLOPs, one colour per family; a cache's intervals are one line."""
    rows = compared(name)["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["family"], row["variant"].rpartition("-N")[0] or row["variant"]), []).append(row)
    # Many variants have equal success: their names stand in the other panels.
    panels = [("success", "success"), ("edit_psnr", "edit PSNR, dB")]
    if any("texture_distance" in row["mean"] for row in rows):
        panels.append(("texture_distance", "texture distance"))
    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (family, method), members in lines.items():
            x, y = [row["mean"]["flops"] / 1e12 for row in members], [row["mean"][key] for row in members]
            first = method == next(other for kind, other in lines if kind == family)
            axis.plot(
                x, y, marker="o", linewidth=0.7, color=f"C{families.index(family)}", label=family if first else None
            )
            if key != "success":
                axis.annotate(method, (x[-1], y[-1]), fontsize=7)
        over_cost(axis, label)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def clock_figure(name: str, path: Path) -> None:
    """Clock ratio over edited share, one panel per model, for one 1024 x 1024 picture and one blob."""
    rows = [r for r in against_faster(load(name)["rows"]) if r["batch"] == 1 and r["shape"] == "blob"]
    rows = [r for r in rows if (r["height"], r["width"]) == (1024, 1024)] or rows
    models = list(dict.fromkeys(r["model"] for r in rows))
    if not models:
        return
    figure = Figure(figsize=(5.5 * len(models), 4), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for preset, restore in dict.fromkeys((r["preset"], r["restore"]) for r in rows if r["model"] == model):
            key = (model, preset, restore)
            line = sorted((r["edit_fraction"], r["speedup"]) for r in rows if _kind(r) == key)
            axis.plot(
                [100 * share for share, _ in line], [ratio for _, ratio in line],
                marker="^" if restore == "reference" else "o", label=f"{preset}, {restore}",
            )  # fmt: skip
        axis.set_title(model)
        axis.set_xlabel("edited, % of the cells")
        axis.set_ylabel("clock ratio")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def stages_figure(name: str, path: Path) -> None:
    """Seconds of every stage, one bar per preset and restore, for the share nearest to a fifth."""
    rows = [r for r in against_faster(load(name)["rows"]) if r["batch"] == 1 and r["shape"] == "blob"]
    rows = [r for r in rows if (r["height"], r["width"]) == (1024, 1024)] or rows
    nearest: dict[tuple, dict] = {}
    for r in rows:
        old = nearest.get(_kind(r))
        if old is None or abs(r["edit_fraction"] - 0.2) < abs(old["edit_fraction"] - 0.2):
            nearest[_kind(r)] = r
    if not nearest:
        return
    figure = Figure(figsize=(9, 1 + 0.35 * len(nearest)), layout="constrained")
    axis = figure.subplots()
    labels = [", ".join(key) for key in nearest]
    left = [0.0] * len(labels)
    for stage in ("encode", "draft", "verify", "coarse", "second look", "mixed", "full", "decode"):
        seconds = [sum(s["seconds"] for s in r["stages"] if s["name"] == stage) for r in nearest.values()]
        axis.barh(labels, seconds, left=left, label=stage)
        left = [a + b for a, b in zip(left, seconds)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(ncols=8, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=90)


def _kind(row: dict) -> tuple[str, str, str]:
    return row["model"], f"{row['preset']} {row.get('changes', '')}".strip(), row["restore"]

"""Tables of variants over many tasks: quality, kinds of edits, sweeps, temporal caches."""

from pathlib import Path

from docs_cases import MOST, average, clock_ratio, compared, mean_seconds
from docs_results import default_steps, edited_by, number, source, table, to_default

from specedit.config import STOCK_STEPS

SMALL = 0.15  # share of the picture; the goals are about edits up to this size
TOTALS = ("FLOPs", "clock")
RATIOS = [f"{what} ratio to {STOCK_STEPS}" for what in TOTALS]


def stock_row(result: dict, steps: int) -> dict | None:
    """The row of stock with so many steps."""
    return next((row for row in result["rows"] if row["variant"] == f"stock-{steps}"), None)


def ratios_to(stock: dict, row: dict) -> list[str]:
    """How many times fewer operations and seconds than the row of stock."""
    return [
        f"{stock['mean']['flops'] / row['mean']['flops']:.2f}",
        number(clock_ratio(stock["cases"], row["cases"]), ".2f"),
    ]


def against_stock(result: dict, row: dict) -> list[str]:
    """How many times fewer operations and seconds than 50 stock steps. FLOPs may be counted without a run."""
    stock, counted = stock_row(result, STOCK_STEPS), result.get("stock_flops")
    if stock is not None:
        return ratios_to(stock, row)
    return [number(counted and counted / row["mean"]["flops"], ".2f"), "-"]


def against_default(result: dict, row: dict) -> dict[str, str]:
    """Ratios to the pipeline's default steps, by heading: from its row, or from the FLOPs of the 50 steps.

    Empty where the default is 50 steps.
    """
    steps = default_steps(edited_by(result))
    if steps == STOCK_STEPS:
        return {}
    stock = stock_row(result, steps)
    if stock is not None:
        return dict(zip((f"{what} ratio to {steps}" for what in TOTALS), ratios_to(stock, row)))
    fifty = stock_row(result, STOCK_STEPS)
    counted = result.get("stock_flops") if fifty is None else fifty["mean"]["flops"]
    ratio = to_default(edited_by(result), counted / row["mean"]["flops"]) if counted else "-"
    return {f"FLOPs ratio to {steps}": ratio}


def by_cost(rows: list[dict]) -> list[dict]:
    """Stock first, then SpecEdit, each by descending FLOPs."""
    return sorted(rows, key=lambda row: (not row["variant"].startswith("stock"), -row["mean"].get("flops", 0)))


def with_textures(result: dict) -> bool:
    """Whether any variant has edited textures; early files have none."""
    return any("texture_distance" in row["mean"] for row in result["rows"])


def texture_headings(result: dict) -> list[str]:
    """Of the cells of `textures`. None in files without textures."""
    return ["texture", "material"] if with_textures(result) else []


def textures(result: dict, mean: dict) -> list[str]:
    """Distance, and the share of right materials. None in files without textures."""
    if not with_textures(result):
        return []
    return [number(mean.get("texture_distance"), ".2f"), number(mean.get("material"), ".0%")]


def count(row: dict) -> str:
    """How many tasks, textures after a plus."""
    extra = row.get("kinds", {}).get("texture", {}).get("count", 0)
    return f"{row['mean']['count'] - extra:.0f}" + (f" + {extra:.0f}" if extra else "")


def quality(name: str) -> str:
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows = []
    for row in by_cost(result["rows"]):
        m = row["mean"]
        rows.append(
            [row["variant"], count(row), number(m.get("success"), ".1%"), number(m.get("edit_psnr"), ".1f"),
             *textures(result, m), f"{m['keep_psnr']:.1f}", f"{m['flops'] / 1e12:.2f}", *against_stock(result, row),
             *against_default(result, row).values()]
        )  # fmt: skip
    header = ["variant", "tasks", "success", "edit dB", *texture_headings(result)]
    header += ["keep dB", "TFLOPs", *RATIOS]
    header += against_default(result, result["rows"][0])
    return table(header, rows) + source(result, name)


def kinds(name: str) -> str:
    """One column per kind of edit, with its number of tasks; cells are "success, edit dB, keep dB".

    Those of textures are "distance, right materials, keep dB".
    """
    result = compared(name, MOST)
    if result is None:
        return "*not measured yet*"
    variants = by_cost(result["rows"])
    rows = [
        [row["variant"], *(f"{', '.join(of_kind(m))}, {number(m['keep_psnr'], '.1f')}" for m in row["kinds"].values())]
        for row in variants
    ]
    header = ["variant"] + [f"{kind} ({m['count']:.0f})" for kind, m in variants[0]["kinds"].items()]
    return table(header, rows) + source(result, name)


def of_kind(mean: dict) -> list[str]:
    """The two measures of a kind of edit: of those with one right answer, or of textures."""
    if "success" in mean:
        return [f"{mean['success']:.0%}", number(mean["edit_psnr"], ".1f")]
    return [number(mean["texture_distance"], ".2f"), number(mean["material"], ".0%")]


def small_edits(name: str) -> str:
    """Tasks that change at most `SMALL` of the picture, whatever a variant detected."""
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    share = {c["seed"]: c["mask_share"] for row in result["rows"] for c in row["cases"] if "mask_share" in c}
    parts = []
    for row in by_cost(result["rows"]):
        cases = [case for case in row["cases"] if share.get(case["seed"], 1) <= SMALL]
        if cases:
            parts.append((row["variant"], cases))
    stock = next((average(cases, "flops") for variant, cases in parts if variant == "stock-50"), None)
    steps = default_steps(edited_by(result))
    whole = steps == STOCK_STEPS
    rows = []
    for variant, cases in parts:
        drafted = all("edit_fraction" in case for case in cases)
        done = sum(case["flops"] for case in cases)
        asked = sum(case["flops_ratio"] * case["flops"] for case in cases) if drafted else stock and stock * len(cases)
        ratio = asked and asked / done
        own = [] if whole else [number(ratio and ratio * steps / STOCK_STEPS, ".2f")]
        missed = sum(case["missed"] for case in cases) if all("missed" in case for case in cases) else None
        rows.append(
            [variant, str(len(cases)), f"{average(cases, 'edit_fraction'):.1%}" if drafted else "-",
             number(missed, ".0f"), number(ratio, ".2f"), *own, number(average(cases, "success"), ".1%"),
             number(average(cases, "edit_psnr"), ".1f"),
             *textures(result, {key: average(cases, key) for key in ("texture_distance", "material")}),
             number(average(cases, "keep_psnr"), ".1f")]
        )  # fmt: skip
    header = ["variant", "tasks", "found", "drafts without a change", RATIOS[0]]
    header += [*([] if whole else [f"FLOPs ratio to {steps}"]), "success", "edit dB"]
    header += [*texture_headings(result), "keep dB"]
    return table(header, rows) + source(result, name)


def sweep(name: str) -> str:
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows, model = [], edited_by(result)
    whole = default_steps(model) == STOCK_STEPS
    seconds, _, machine = mean_seconds(result)
    for row in sorted(result["rows"], key=lambda row: row["group"] != "base"):
        m = row["mean"]
        change = row["variant"] if row["change"] else "none"
        rows.append(
            [change, number(m.get("success"), ".0%"), number(m.get("edit_psnr"), ".1f"), *textures(result, m),
             number(m["keep_psnr"], ".1f"), f"{m['flops'] / 1e12:.3f}", f"{m['flops_ratio']:.2f}",
             *([] if whole else [to_default(model, m["flops_ratio"])]),
             number(seconds.get(row["variant"]), ".2f"), number(m["recall"], ".0%"), number(m["precision"], ".0%")]
        )  # fmt: skip
    header = ["change", "success", "edit dB", *texture_headings(result), "keep dB", "TFLOPs", RATIOS[0]]
    header += [] if whole else [f"FLOPs ratio to {default_steps(model)}"]
    header += [f"seconds{machine}", "recall", "precision"]
    return table(header, rows) + source(result, name)


def texture_steps(name: str) -> str:
    """The stock pipeline on textures with few and many steps; ratios are to the most steps."""
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    found = sorted(result["rows"], key=lambda row: row["steps"])
    most = found[-1]["mean"].get("texture_distance")
    rows = []
    for row in found:
        m = row["mean"]
        distance = m.get("texture_distance")
        rows.append(
            [str(row["steps"]), f"{m['count']:.0f}", number(distance, ".2f"),
             number(distance and most and distance / most, ".2f"), number(m.get("material"), ".0%"),
             number(m.get("seam"), ".2f"), number(m.get("keep_psnr"), ".1f")]
        )  # fmt: skip
    header = ["steps", "tasks", "texture", f"ratio to {found[-1]['steps']}", "material", "seam", "keep dB"]
    return table(header, rows) + source(result, name)


def forecast(name: str) -> str:
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows, (seconds, _, machine) = [], mean_seconds(result)
    for row in result["rows"]:
        m = row["mean"]
        cached = f"{row['cached_steps']} of {row['nfe']}" if row.get("cached_steps") else "-"
        held = f"{row['cache_bytes'] / 2**20:.1f}" if row.get("cache_bytes") else "-"
        rows.append(
            [row["variant"], count(row), number(m.get("success"), ".1%"), number(m.get("edit_psnr"), ".1f"),
             *textures(result, m), number(m["keep_psnr"], ".1f"), f"{m['flops'] / 1e12:.3f}",
             number(seconds.get(row["variant"]), ".1f"), *against_stock(result, row),
             *against_default(result, row).values(), cached, held]
        )  # fmt: skip
    header = ["variant", "tasks", "success", "edit dB", *texture_headings(result), "keep dB",
              "TFLOPs", f"seconds{machine}", *RATIOS,
              *against_default(result, result["rows"][0]), "cached steps", "cache MiB"]  # fmt: skip
    shown = "Success, edit PSNR and texture distance" if with_textures(result) else "Success and edit PSNR"
    picture = f"\n\n![{shown} over FLOPs](images/{Path(name).stem}.png)"
    return table(header, rows) + source(result, name) + picture

"""Tables of what was measured."""

from pathlib import Path

import docs_results
import kernel_pages
from docs_cases import average, clock_ratio, compared, mean_seconds
from docs_paper import PAPERS
from docs_results import against_faster, default_steps, edited_by, load, number, source, table, to_default

from specedit.config import STOCK_STEPS

SMALL = 0.15  # share of the picture; the goals are about edits up to this size


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


TOTALS = ("FLOPs", "clock")
RATIOS = [f"{what} ratio to {STOCK_STEPS}" for what in TOTALS]
OWN = "FLOPs ratio to its default steps"


def by_cost(rows: list[dict]) -> list[dict]:
    """Stock first, then SpecEdit, each by descending FLOPs."""
    return sorted(rows, key=lambda row: (not row["variant"].startswith("stock"), -row["mean"].get("flops", 0)))


def with_textures(result: dict) -> bool:
    """Whether any variant has edited textures; early files have none."""
    return any("texture_distance" in row["mean"] for row in result["rows"])


TEXTURES = ["texture", "material"]


def textures(result: dict, mean: dict) -> list[str]:
    """The cells under `TEXTURES`: distance, and the share of right materials. None in files without textures."""
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
    header = ["variant", "tasks", "success", "edit dB", *(TEXTURES if with_textures(result) else [])]
    header += ["keep dB", "TFLOPs", *RATIOS]
    header += against_default(result, result["rows"][0])
    return table(header, rows) + source(result, name)


def kinds(name: str) -> str:
    """One column per kind of edit, with its number of tasks; cells are "success, edit dB, keep dB".

    Those of textures are "distance, right materials, keep dB".
    """
    result = compared(name)
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
    header += [*(TEXTURES if with_textures(result) else []), "keep dB"]
    return table(header, rows) + source(result, name)


def sweep(name: str) -> str:
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows, model = [], edited_by(result)
    whole = default_steps(model) == STOCK_STEPS
    seconds, machine = mean_seconds(result)
    for row in sorted(result["rows"], key=lambda row: row["group"] != "base"):
        m = row["mean"]
        change = row["variant"] if row["change"] else "none"
        rows.append(
            [change, number(m.get("success"), ".0%"), number(m.get("edit_psnr"), ".1f"), *textures(result, m),
             number(m["keep_psnr"], ".1f"),
             f"{m['flops_ratio']:.2f}", *([] if whole else [to_default(model, m["flops_ratio"])]),
             number(seconds.get(row["variant"]), ".2f"), number(m["recall"], ".0%"), number(m["precision"], ".0%")]
        )  # fmt: skip
    header = ["change", "success", "edit dB", *(TEXTURES if with_textures(result) else []), "keep dB", RATIOS[0]]
    header += [] if whole else [f"FLOPs ratio to {default_steps(model)}"]
    header += [f"seconds{machine}", "recall", "precision"]
    return table(header, rows) + source(result, name)


def bench(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = [
        [r["preset"], r["restore"], f"{r['edit_fraction']:.0%}", f"{r['seconds_stock']:.2f}", f"{r['seconds']:.2f}",
         f"{r['speedup']:.2f}", f"{r['flops_ratio']:.2f}", f"{r['speedup'] / r['flops_ratio']:.2f}",
         to_default(r["model"], r["flops_ratio"])]
        for r in result["rows"]
    ]  # fmt: skip
    header = ["preset", "restore", "edited", "stock s", "s", *reversed(RATIOS), "quotient", OWN]
    return table(header, rows) + source(result, name)


def real(name: str) -> str:
    files = sorted(docs_results.RESULTS.glob(f"{Path(name).stem}*.json"))
    if not files:
        return "*not measured yet*"
    return "\n\n".join(real_file(file.name) for file in files)


def real_file(name: str) -> str:
    result, stem = load(name), Path(name).stem
    rows = []
    for r in against_faster(result["rows"]):
        clock, flops = PAPERS.get(r["model"], {}).get(r["preset"], (None, None))
        changes = r.get("changes", "")
        ratio_50 = r["flops_ratio"] * STOCK_STEPS / r.get("stock_steps", STOCK_STEPS)
        if r["restore"] != "full" or changes or (r["height"], r["width"], r["batch"]) != (1024, 1024, 1):
            clock = flops = None  # the paper has no such row
        memory = None if r["peak_memory"] is None else r["peak_memory"] / r["peak_memory_stock"] - 1
        rows.append(
            [r["model"], f"{r['height']} x {r['width']}", str(r["batch"]), f"{r['preset']} {changes}".strip(),
             r["restore"], f"{r['edit_fraction']:.0%} {r['shape']}", f"{r['seconds_stock']:.2f}",
             f"{r['seconds']:.3f} ± {r['spread'] / 2:.3f}", f"{r['speedup']:.2f}", f"{r['flops_ratio']:.2f}",
             f"{r['speedup'] / r['flops_ratio']:.2f}", to_default(r["model"], ratio_50),
             number(memory, "+.1%"), number(clock, ".2f"), number(flops, ".2f")]
        )  # fmt: skip
    if not rows:
        return "*not measured yet*"
    header = [
        "model", "size", "batch", "preset", "restore", "edited", "stock s", "s", *reversed(RATIOS),
        "quotient", OWN, "peak memory", "paper, clock", "paper, FLOPs",
    ]  # fmt: skip
    text = "\n\nRandom weights at the released sizes. Medians against the faster of stock's baselines: "
    text += ", ".join(sorted({r["baseline"] for r in against_faster(result["rows"])}))
    pictures = f"\n\n![Clock ratio over edited share](images/{stem}-clock.png)"
    pictures += f"\n\n![Seconds of every stage](images/{stem}-stages.png)"
    return table(header, rows) + text + "; ± is half of what the repetitions span." + source(result, name) + pictures


def steps(name: str) -> str:
    result = load(name)
    if result is None or not result["transformer"]:
        return "*not measured yet*"
    rows = [
        [c["model"], c["execution"], c["layout"], f"{c['tokens']:,}", f"{r['ms']:.1f}", f"{r['tflops']:.0f}"]
        for r in result["transformer"]
        for c in [r["case"]]
    ]
    return table(["model", "execution", "sequence", "tokens", "ms a step", "TFLOP/s"], rows) + source(result, name)


def verification(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    values: dict[tuple, dict] = {}
    for r in result["rows"]:
        values.setdefault(r["threshold"], {})[r["verify_at"], r["size"]] = r
    columns = [(at, size) for size in (256, 512) for at in ("full", "draft")]
    rows = [
        [f"{threshold}", *(f"{cells[c]['recall']:.0%} / {cells[c]['false']:.1%}" for c in columns)]
        for threshold, cells in values.items()
    ]
    header = ["threshold", *(f"{at}, {size} px" for at, size in columns)]
    return table(header, rows) + source(result, name)


def decoding(name: str) -> str:
    """One row for each way of decoding, those with a smaller halo than others of their kind left out."""
    result = load(name)
    if result is None:
        return "*not measured yet*"
    kinds = ("model", "size", "method", "whole")
    widest = {tuple(r[k] for k in kinds): r for r in sorted(result["rows"], key=lambda r: r["halo"])}
    rows = [
        [r["autoencoder"], str(r["size"]), r["method"], r["whole"], str(r["halo"]), f"{r['psnr_min']:.1f}",
         f"{r['psnr_median']:.1f}", f"{r['time_ratio']:.2f}"]
        for r in result["rows"]
        if r is widest[tuple(r[k] for k in kinds)]
    ]  # fmt: skip
    shares = {r["size"]: r["edited_median"] for r in result["rows"]}
    text = " and ".join(f"{share:.1%} of the picture at {size} px" for size, share in shares.items())
    text = f"\n\n{result['rows'][0]['edits']} edits a size, in the median of {text}."
    header = ["autoencoder", "px", "statistics", "sees whole", "halo, latents", "least dB", "median dB", "time ratio"]
    return table(header, rows) + text + source(result, name)


SESSIONS = {
    "masked": "`keep_pixels`, the object's mask as `edit_mask`",
    "found": "`keep_pixels`, no mask",
    "all pixels": "no kept pixels",
}


OVERHEAD = {
    "python_calls": "calls of Python functions", "python_ms": "Python, ms", "operators_ms": "other operators, ms",
    "overhead_ms": "overhead, ms", "transformer_ms": "transformer's operators, ms", "call_ms": "call unprofiled, ms",
}  # fmt: skip


def call_overhead(name: str) -> str:
    """What a call takes now and before, and the ratio of the two."""
    result = load(name)
    if result is None:
        return "*not measured yet*"
    now, before = ({row["code"]: row for row in result["rows"]}[code] for code in ("now", "before"))
    rows = [
        [what, f"{before[key]:,.0f}", f"{now[key]:,.0f}", f"{now[key] / before[key]:.2f}"]
        for key, what in OVERHEAD.items()
    ]
    return table(["of one call", f"at {result['before']}", "now", "ratio"], rows) + source(result, name)


def training(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    last = {(row.get("run", 1), row["part"]): row for row in result["rows"]}
    rows = [[str(run), part, str(row["step"]), f"{row['seconds'] / 60:.0f}"] for (run, part), row in last.items()]
    text = table(["run", "part", "steps", "minutes"], rows)
    trip = next((r["roundtrip_512"] for r in result["rows"] if "roundtrip_512" in r), None)
    if trip is not None:
        text += f"\n\nAutoencoder round trip at 512 px: {trip:.1f} dB."
    return text + source(result, name)


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


def session(name: str) -> str:
    """Kept and untouched pixels after the first and the last edit of a session, and what another seed encodes."""
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows, lines = [row for row in result["rows"] if not row["again"]], []
    last = max(row["edit"] for row in rows)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        ends = [[row for row in own if row["edit"] == edit] for edit in (1, last)]
        keeps, hazes = ([mean_of(end, name) for end in ends] for name in ("keep_psnr", "haze_psnr"))
        left = sum(row.get("haze_psnr") is not None for row in ends[1])
        again = [row for row in result["rows"] if row["again"] and row["variant"] == variant]
        encodings = sum(row["prompt_encodings"] + row["picture_encodings"] for row in again)
        lines.append(
            [
                SESSIONS[variant],
                f"{sum(row['success'] for row in own) / len(own):.0%}",
                *(number(value, ".1f") for value in keeps),
                f"{number(mean_of(ends[1], 'untouched'), '.0%')} ({left} of {len(ends[1])} scenes)",
                *(number(value, ".1f") for value in hazes),
                f"{encodings}",
            ]
        )
    header = [
        "edits in a row", "success", "keep dB after 1", f"keep dB after {last}", "untouched", "haze dB after 1",
        f"haze dB after {last}", "encodings of another seed",
    ]  # fmt: skip
    scenes = len({row["scene"] for row in rows})
    return table(header, lines) + (
        f"\n\nKeep dB: to the scene ({scenes} of them, {result['of']['size']} px), at most 60, over the pixels that no "
        "edit was to change, without a margin of 16 px. Haze dB: likewise over the untouched pixels, which no "
        "report of the session calls edited, in the scenes that have any. Success: the object has the colour that was "
        "asked for."
    ) + source(result, name)  # fmt: skip


def mean_of(rows: list[dict], name: str) -> float | None:
    """Of the rows that have a value; None without any."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def forecast(name: str) -> str:
    result = compared(name)
    if result is None:
        return "*not measured yet*"
    rows, (seconds, machine) = [], mean_seconds(result)
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
    header = ["variant", "tasks", "success", "edit dB", *(TEXTURES if with_textures(result) else []), "keep dB",
              "TFLOPs", f"seconds{machine}", *RATIOS,
              *against_default(result, result["rows"][0]), "cached steps", "cache MiB"]  # fmt: skip
    picture = f"\n\n![Success and edit PSNR over FLOPs](images/{Path(name).stem}.png)"
    return table(header, rows) + source(result, name) + picture


def kernels(name: str) -> str:
    files = sorted(docs_results.RESULTS.glob(f"{Path(name).stem}*.json"))
    if not any(load(file.name)["machine"]["gpu"] for file in files):
        return "\n\n".join(["*Not measured on a GPU yet.*", *(kernels_file(file.name) for file in files)])
    return "\n\n".join(kernels_file(file.name) for file in files)


def kernels_file(name: str) -> str:
    result, gpu = load(name), load(name)["machine"]["gpu"]
    parts = [f"### {gpu or 'On a CPU, small sizes'}" + source(result, name)]
    if gpu is None:
        parts.append("CPU tensors take the plain PyTorch path: this shows the harness at work, not the Triton kernels.")
    tables = [*kernel_pages.measured(result), *([kernel_pages.goals(result)] if gpu else [])]
    for title, header, rows in tables:
        parts.append(f"`{title}`" if title != "goals" else "Goals")
        parts.append(table(header, rows))
        if title != "goals":
            parts.append(f"![Rates of {title}](images/{Path(name).stem}-{title}.png)")
    return "\n\n".join(parts)

"""Writes every figure of README.md and docs/ from the JSON files in benchmarks/results.

    python scripts/make_docs.py [--check]

A page marks the places: everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced. --check writes
nothing and fails if anything would change. Pictures go to docs/images.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The paper's own figures (arXiv 2605.02152, Table 5, FLUX.1-Kontext-dev on an A100), for comparison only.
PAPER = {"quality": (3.15, 3.31), "balanced": (4.10, 5.38), "fast": (6.40, 6.92), "turbo": (7.05, 7.37)}

# The paper's rows with temporal caches and distilled models (arXiv 2605.02152), likewise.
PAPER_FORECASTS = [
    ["FLUX.1-Kontext", "TaylorSeer, N=6", "50", "3.60x", "5.00x"],
    ["FLUX.1-Kontext", "TaylorSeer, N=9", "50", "4.39x", "-"],
    ["FLUX.1-Kontext", "FORA, N=6", "50", "4.09x", "-"],
    ["FLUX.1-Kontext", "FORA, N=9", "50", "5.83x", "-"],
    ["FLUX.1-Kontext", "SpecEdit + TaylorSeer", "30", "4.39x", "6.70x"],
    ["FLUX.1-Kontext-Lightning", "distilled", "8", "6.09x", "6.25x"],
    ["FLUX.1-Kontext-Lightning", "distilled", "6", "7.89x", "8.33x"],
    ["FLUX.1-Kontext-Lightning", "distilled + SpecEdit", "8", "7.20x", "9.68x"],
    ["FLUX.1-Kontext-Lightning", "distilled + SpecEdit", "6", "9.16x", "13.03x"],
    ["Qwen-Image-Edit", "FORA, N=6", "50", "4.71x", "-"],
    ["Qwen-Image-Edit", "FoCa, N=9", "50", "3.81x", "-"],
    ["Qwen-Image-Edit", "DuCa, N=8", "50", "3.66x", "-"],
    ["Qwen-Image-Edit", "FreqCa, N=5", "50", "3.99x", "-"],
    ["Qwen-Image-Edit", "SpecEdit + FoCa", "18", "6.00x", "6.34x"],
]


# The same on Qwen-Image-Edit (Table 1): clock ratio, and TFLOPs of the run; 50 full steps take QWEN_STOCK.
PAPER_QWEN = {
    "quality": (2.96, 8623.70),
    "balanced": (5.08, 5230.34),
    "fast": (6.04, 3992.31),
    "turbo": (6.43, 2580.52),
}
QWEN_STOCK = 28219.71
PAPERS = {
    "flux-kontext": PAPER,
    "qwen-image-edit": {preset: (clock, QWEN_STOCK / tera) for preset, (clock, tera) in PAPER_QWEN.items()},
}
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


def quality(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    stock = next((r["mean"] for r in result["rows"] if r["variant"] == "stock-50"), None)
    rows = []
    for row in result["rows"]:
        m = row["mean"]
        against = (
            [f"{stock['flops'] / m['flops']:.2f}", f"{stock['seconds'] / m['seconds']:.2f}"] if stock else ["-", "-"]
        )
        rows.append(
            [row["variant"], f"{m['count']:.0f}", f"{m['success']:.1%}", f"{m['edit_psnr']:.1f}",
             f"{m['keep_psnr']:.1f}", f"{m['flops'] / 1e12:.2f}", *against]
        )  # fmt: skip
    header = ["variant", "tasks", "success", "edit dB", "keep dB", "TFLOPs", "FLOPs ratio", "clock ratio"]
    return table(header, rows) + source(result, name)


def kinds(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = []
    for row in result["rows"]:
        for kind, m in row["kinds"].items():
            rows.append(
                [row["variant"], kind, f"{m['count']:.0f}", f"{m['success']:.0%}", number(m["edit_psnr"], ".1f"),
                 number(m["keep_psnr"], ".1f")]
            )  # fmt: skip
    return table(["variant", "kind", "tasks", "success", "edit dB", "keep dB"], rows) + source(result, name)


def small_edits(name: str) -> str:
    result = load(name)
    rows = []
    for row in (result or {"rows": []})["rows"]:
        m = row.get("small")
        if m and "flops_ratio" in m:
            rows.append(
                [row["variant"], f"{m['count']:.0f}", f"{m['edit_fraction']:.1%}", f"{m['flops_ratio']:.2f}",
                 f"{m['success']:.1%}", f"{m['keep_psnr']:.1f}"]
            )  # fmt: skip
    if not rows:
        return "*not measured yet*"
    return table(["variant", "tasks", "edited", "FLOPs ratio", "success", "keep dB"], rows) + source(result, name)


def sweep(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = []
    for row in result["rows"]:
        m = row["mean"]
        change = ", ".join(f"{k}={v}" for k, v in row["change"].items()) or "turbo, restore=reference"
        rows.append(
            [change, f"{m['success']:.0%}", f"{m['edit_psnr']:.1f}", number(m["keep_psnr"], ".1f"),
             f"{m['flops_ratio']:.2f}", f"{m['recall']:.0%}", f"{m['precision']:.0%}"]
        )  # fmt: skip
    header = ["change", "success", "edit dB", "keep dB", "FLOPs ratio", "recall", "precision"]
    return table(header, rows) + source(result, name)


def bench(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = [
        [r["preset"], r["restore"], f"{r['edit_fraction']:.0%}", f"{r['seconds_stock']:.2f}", f"{r['seconds']:.2f}",
         f"{r['speedup']:.2f}", f"{r['flops_ratio']:.2f}", f"{r['speedup'] / r['flops_ratio']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    header = ["preset", "restore", "edited", "stock s", "s", "clock ratio", "FLOPs ratio", "quotient"]
    return table(header, rows) + source(result, name)


def plan(name: str) -> str:
    from specedit.flops import plan as predict

    rows = []
    for preset, (clock, flops) in PAPER.items():
        ours = [predict(preset, "flux-kontext", 1024, 1024, share)["flops_ratio"] for share in (0.1, 0.2, 0.4)]
        rows.append([preset, *(f"{r:.2f}" for r in ours), f"{flops:.2f}", f"{clock:.2f}"])
    header = ["preset", "10 % edited", "20 % edited", "40 % edited", "paper, FLOPs", "paper, clock (A100)"]
    return (
        table(header, rows)
        + "\n\nPredicted by `specedit.flops.plan`, not measured; the last two columns are the paper's."
    )


def plan_qwen(name: str) -> str:
    from dataclasses import replace

    from specedit.config import presets
    from specedit.flops import MODELS, STOCK_STEPS, transformer_flops
    from specedit.flops import plan as predict

    cost = MODELS["qwen-image-edit"]
    image = 2 * 64 * 64  # target and reference at 1024 x 1024
    step, theirs = cost.step(image) / 1e12, QWEN_STOCK / STOCK_STEPS
    needed = next(n for n in range(0, 100_000, 10) if transformer_flops(cost.config, n) >= theirs * 1e12 / cost.passes)
    words = replace(cost, text_tokens=cost.text_tokens - cost.vision_tokens, vision_tokens=0)

    def ratio(preset: str, share: float = 0.2, model=cost, **change) -> float:
        return predict(replace(presets[preset], **change), model, 1024, 1024, share)["flops_ratio"]

    rows = []
    for preset, (clock, tera) in PAPER_QWEN.items():
        ours = [ratio(preset, share) for share in (0.1, 0.2, 0.4)]
        ours += [ratio(preset, draft_condition="small"), ratio(preset, model=words)]
        rows.append([preset, *(f"{r:.2f}" for r in ours), f"{QWEN_STOCK / tera:.2f}", f"{clock:.2f}"])
    header = ["preset", "10 % edited", "20 % edited", "40 % edited", "20 %, `draft_condition=\"small\"`",
              "20 %, words only", "paper, FLOPs", "paper, clock (A100)"]  # fmt: skip
    turbo, full = PAPER_QWEN["turbo"][1] / theirs, presets["turbo"].steps[2]
    close = {p: f"{ratio(p, model=words):.2f} against {QWEN_STOCK / PAPER_QWEN[p][1]:.2f}" for p in PAPER_QWEN}
    paragraphs = [
        f"Assumed: 60 blocks, 24 heads of 128, {cost.vision_tokens:,} vision tokens and "
        f"{cost.text_tokens - cost.vision_tokens} words in the text stream, {image:,} image tokens, {cost.passes} "
        f"halves under guidance. A full step then takes {step:.0f} T, {step / cost.passes:.0f} T a half. The paper has "
        f"{QWEN_STOCK:,.0f} T for {STOCK_STEPS} steps, {theirs:.0f} T a step, which these sizes do not give: it would "
        f"take {needed:,} tokens in each half instead of {cost.text_tokens + image:,}. The paper names no sizes, so "
        "ratios are compared, not sums.",
        f"- `quality`: the vision tokens are a fixed cost that no stage makes smaller; counted without them the "
        f"prediction is {close['quality']}.",
        f"- `balanced`: the same, and more of it, because fewer steps are full; without them {close['balanced']}.",
        f"- `fast`: the draft alone takes {share_of_draft('fast'):.0%} of the run, mostly text; without vision tokens "
        f"{close['fast']}.",
        f"- `turbo`: the text explains little of it. The paper's run costs {turbo:.2f} of its own full steps, draft "
        f"included, while the preset takes {full} of them at full resolution, as the paper's run on FLUX does; on Qwen "
        f'it must have taken fewer. `restore="reference"` goes below that floor too: '
        f"{ratio('turbo', 0.15, restore='reference'):.2f} at 15 % edited, "
        f"{ratio('turbo', 0.15, restore='reference', draft_condition='small'):.2f} with the small condition image.",
        "Predicted by `specedit.flops.plan`, not measured; the last two columns are the paper's.",
    ]
    return table(header, rows) + "\n\n" + paragraphs[0] + "\n\n" + "\n".join(paragraphs[1:5]) + "\n\n" + paragraphs[5]


def share_of_draft(preset: str) -> float:
    from specedit.flops import plan as predict

    run = predict(preset, "qwen-image-edit", 1024, 1024, 0.2)
    return run["stages"][0]["flops"] / run["flops"]


def roofline(name: str) -> str:
    from specedit.config import CHOICES, resolve
    from specedit.plan import GPUS
    from specedit.plan import plan as predict

    rows = []
    for model, paper in PAPERS.items():
        for preset in paper:
            for restore in CHOICES["restore"]:
                config = resolve(preset, restore=restore)
                plans = [predict(config, model, 1024, 1024, 0.2, gpu) for gpu in GPUS]
                ratios = [f"{p['clock_ratio']:.2f} ({p['quotient']:.2f})" for p in plans]
                rows.append([model, preset, restore, f"{plans[0]['flops_ratio']:.2f}", *ratios])
    text = (
        "\n\nPredicted, not measured: clock ratios over 50 stock steps if every operator ran at its roofline, and in "
        "brackets their quotient by the FLOPs ratio. Encoding, verification and decoding are in them. "
    )
    peaks = "; ".join(f"{n}: {g.flops / 1e12:.0f} TFLOP/s, {g.bandwidth / 1e12:.2f} TB/s" for n, g in GPUS.items())
    return table(["model", "preset", "restore", "FLOPs ratio", *GPUS], rows) + text + f"Published peaks: {peaks}."


def switches(name: str) -> str:
    """What every exact and approximate switch brings to the presets that the goals speak of."""
    from specedit.config import resolve
    from specedit.plan import plan as predict

    every = {
        'every row of the last block (`attention="stock"`)': dict(attention="stock"),
        "as installed": {},
        '`draft_condition="small"`': dict(draft_condition="small"),
        "`draft_steps=4`": dict(draft_steps=4),
        "`reference_refresh=2`": dict(reference_refresh=2),
        "`reference_refresh=4`": dict(reference_refresh=4),
        "`guidance_range=(0.2, 0.9)`": dict(guidance_range=(0.2, 0.9)),
        "`guidance_range=(0.2, 1)`": dict(guidance_range=(0.2, 1)),
        "`reference_refresh=4, guidance_range=(0.2, 1)`": dict(reference_refresh=4, guidance_range=(0.2, 1)),
        'that, `draft_steps=4, draft_condition="small"`': dict(
            draft_condition="small", draft_steps=4, reference_refresh=4, guidance_range=(0.2, 1)
        ),
    }
    asked = [("flux-kontext", 0.1), ("flux-kontext", 0.2), ("qwen-image-edit", 0.2)]
    rows = []
    for label, change in every.items():
        cells = []
        for model, share in asked:
            only_qwen = model == "flux-kontext" and change.keys() & {"draft_condition", "guidance_range"}
            if only_qwen and len(change) < 3:  # nothing that FLUX has
                cells += ["-", "-"]
                continue
            config = resolve("turbo", restore="reference", **change)
            run = predict(config, model, 1024, 1024, share, "H100")
            cells += [f"{run['flops_ratio']:.2f}", f"{run['clock_ratio']:.2f}"]
        rows.append([label, *cells])
    header = ['`turbo`, `restore="reference"`']
    header += [f"{model}, {share:.0%}: {what}" for model, share in asked for what in ("FLOPs", "H100")]
    return table(header, rows) + (
        "\n\nPredicted, not measured: ratios to 50 stock steps at 1024 x 1024 with this share edited, of operations "
        "and of an H100's roofline seconds. The first two rows are exact; every other is an approximation whose error "
        "the sweep on the embedded editor measures."
    )


def against_faster(rows: list[dict]) -> list[dict]:
    """Of every setting the row with the faster baseline and the faster way of running SpecEdit, in the file's order."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (*(row[name] for name in SETTING), row.get("changes", ""))
        old = best.get(key)
        if old is None or (row["seconds_stock"], row["seconds"]) < (old["seconds_stock"], old["seconds"]):
            best[key] = row
    return list(best.values())


def real(name: str) -> str:
    files = sorted(RESULTS.glob(f"{Path(name).stem}*.json"))
    if not files:
        return "*not measured yet*"
    return "\n\n".join(real_file(file.name) for file in files)


def real_file(name: str) -> str:
    result, stem = load(name), Path(name).stem
    rows = []
    for r in against_faster(result["rows"]):
        clock, flops = PAPERS.get(r["model"], {}).get(r["preset"], (None, None))
        changes = r.get("changes", "")
        if r["restore"] != "full" or changes or (r["height"], r["width"], r["batch"]) != (1024, 1024, 1):
            clock = flops = None  # the paper has no such row
        memory = None if r["peak_memory"] is None else r["peak_memory"] / r["peak_memory_stock"] - 1
        rows.append(
            [r["model"], f"{r['height']} x {r['width']}", str(r["batch"]), f"{r['preset']} {changes}".strip(),
             r["restore"], f"{r['edit_fraction']:.0%} {r['shape']}", f"{r['seconds_stock']:.2f}",
             f"{r['seconds']:.3f} ± {r['spread'] / 2:.3f}", f"{r['speedup']:.2f}", f"{r['flops_ratio']:.2f}",
             f"{r['speedup'] / r['flops_ratio']:.2f}", number(memory, "+.1%"), number(clock, ".2f"),
             number(flops, ".2f")]
        )  # fmt: skip
    if not rows:
        return "*not measured yet*"
    header = [
        "model", "size", "batch", "preset", "restore", "edited", "stock s", "s", "clock ratio", "FLOPs ratio",
        "quotient", "peak memory", "paper, clock", "paper, FLOPs",
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


def training(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    last = {row["part"]: row for row in result["rows"]}
    rows = [[part, str(row["step"]), f"{row['seconds'] / 60:.0f}"] for part, row in last.items()]
    text = table(["part", "steps", "minutes"], rows)
    trip = next((r["roundtrip_512"] for r in result["rows"] if "roundtrip_512" in r), None)
    if trip is not None:
        text += f"\n\nAutoencoder round trip at 512 px: {trip:.1f} dB."
    return text + source(result, name)


def forecast(name: str) -> str:
    result = load(name)
    if result is None:
        return "*not measured yet*"
    stock = next((r["mean"] for r in result["rows"] if r["variant"] == "stock-50"), None)
    rows = []
    for row in result["rows"]:
        m = row["mean"]
        against = [f"{stock[k] / m[k]:.2f}" if stock else "-" for k in ("flops", "seconds")]
        cached = f"{row['cached_steps']} of {row['nfe']}" if row.get("cached_steps") else "-"
        held = f"{row['cache_bytes'] / 2**20:.1f}" if row.get("cache_bytes") else "-"
        rows.append(
            [row["variant"], f"{m['count']:.0f}", f"{m['success']:.1%}", f"{m['edit_psnr']:.1f}",
             number(m["keep_psnr"], ".1f"), f"{m['flops'] / 1e12:.3f}", f"{m['seconds']:.1f}", *against, cached, held]
        )  # fmt: skip
    header = ["variant", "tasks", "success", "edit dB", "keep dB", "TFLOPs", "seconds", "FLOPs ratio", "clock ratio",
              "cached steps", "cache MiB"]  # fmt: skip
    picture = f"\n\n![Success and edit PSNR over FLOPs](images/{Path(name).stem}.png)"
    return table(header, rows) + source(result, name) + picture


def forecast_plan(name: str) -> str:
    from specedit.config import FORECASTS, resolve
    from specedit.flops import plan as predict

    plain = predict("balanced", "flux-kontext", 1024, 1024, 0.2)["flops_ratio"]
    rows = [["none", "1.00", "1.00", "1.00", f"{plain:.2f}"]]
    for method, order in FORECASTS.items():
        fields = {"forecast": method}
        alone = [
            predict(resolve(steps=(0, 0, 50), forecast_interval=n, **fields), "flux-kontext", 1024, 1024, 0.2)
            for n in (4, 6, 9)
        ]
        fields |= {"forecast_order": 1} if order else {}
        both = predict(resolve("balanced", forecast_interval=3, **fields), "flux-kontext", 1024, 1024, 0.2)
        rows.append([f"`{method}`", *(f"{p['flops_ratio']:.2f}" for p in alone), f"{both['flops_ratio']:.2f}"])
    header = ["`forecast`", "alone, N=4", "N=6", "N=9", "`balanced`, N=3, order 1"]
    said = "FLOPs ratios to 50 stock steps, 1024 px, 20 % edited, predicted by `specedit.flops.plan`, not measured."
    return f"{table(header, rows)}\n\n{said}"


def forecast_paper(name: str) -> str:
    header = ["model", "combination", "NFE", "clock", "FLOPs"]
    return table(header, PAPER_FORECASTS) + "\n\nThe paper's figures (arXiv 2605.02152), not measured here."


MAKERS = {
    "forecast": forecast, "forecast-plan": forecast_plan, "forecast-paper": forecast_paper,
    "quality": quality, "kinds": kinds, "small": small_edits, "sweep": sweep, "bench": bench, "plan": plan,
    "plan-qwen": plan_qwen, "switches": switches,
    "training": training,
    "verification": verification, "roofline": roofline, "real": real, "steps": steps,
}  # fmt: skip


def fill(text: str) -> str:
    """Replace every marked place. A name is MAKER:FILE, FILE without .json."""

    def place(match: re.Match) -> str:
        maker, _, file = match["name"].partition(":")
        return f"<!-- table: {match['name']} -->\n{MAKERS[maker](file + '.json')}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\S+) -->\n.*?<!-- end -->", place, text, flags=re.S)


def pareto(name: str, path: Path) -> None:
    """Success and edit PSNR over FLOPs of every variant."""
    result = load(name)
    if result is None:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("success", "edit_psnr"), ("success", "edit PSNR, dB")):
        for family, marker in (("stock", "s"), ("full", "o"), ("reference", "^")):
            rows = [r for r in result["rows"] if r["variant"].startswith(family) or r["variant"].endswith(family)]
            if not rows:
                continue
            x = [r["mean"]["flops"] / 1e12 for r in rows]
            axis.plot(x, [r["mean"][key] for r in rows], marker=marker, label=family)
            for r, at in zip(rows, x):
                axis.annotate(r["variant"].split("-")[-1 if family == "stock" else 0], (at, r["mean"][key]), fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("TFLOPs an edit")
        axis.set_ylabel(label)
        axis.legend()
    figure.savefig(path, dpi=90)


def forecast_pareto(name: str, path: Path) -> None:
    """Success and edit PSNR over FLOPs, one mark a variant, one colour a family."""
    rows = load(name)["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("success", "edit_psnr"), ("success", "edit PSNR, dB")):
        for i, family in enumerate(families):
            members = [row for row in rows if row["family"] == family]
            x, y = ([row["mean"][k] for row in members] for k in ("flops", key))
            axis.scatter([value / 1e12 for value in x], y, color=f"C{i}", label=family)
            for row, a, b in zip(members, x, y):
                axis.annotate(row["variant"].removeprefix("specedit-"), (a / 1e12, b), fontsize=6)
        axis.set_xscale("log")
        axis.set_xlabel("TFLOPs an edit")
        axis.set_ylabel(label)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def clock_figure(name: str, path: Path) -> None:
    """Clock ratio against edited share, a panel for each model, of one picture of 1024 x 1024 and one blob."""
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
    """Seconds of every stage, a bar for each preset and restore, of the share nearest to a fifth."""
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
    for stage in ("encode", "draft", "verify", "coarse", "mixed", "full", "decode"):
        seconds = [sum(s["seconds"] for s in r["stages"] if s["name"] == stage) for r in nearest.values()]
        axis.barh(labels, seconds, left=left, label=stage)
        left = [a + b for a, b in zip(left, seconds)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(ncols=7, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=90)


def _kind(row: dict) -> tuple[str, str, str]:
    return row["model"], f"{row['preset']} {row.get('changes', '')}".strip(), row["restore"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(page)
            if not args.check:
                page.write_text(filled)
    if args.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is not what the results say; run python scripts/make_docs.py")
        return 1 if stale else 0
    for file in sorted(RESULTS.glob("quality-*.json")):
        pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("forecast-*.json")):
        forecast_pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("end_to_end-real*.json")):
        clock_figure(file.name, ROOT / "docs" / "images" / f"{file.stem}-clock.png")
        stages_figure(file.name, ROOT / "docs" / "images" / f"{file.stem}-stages.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of what was measured besides edits' quality: calls, stages, sessions, kernels."""

from pathlib import Path

import docs_results
import kernel_pages
from docs_paper import PAPERS
from docs_quality import RATIOS
from docs_results import against_faster, load, number, source, table, to_default

from specedit.config import STOCK_STEPS

OWN = "FLOPs ratio to its default steps"


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

"""Tables of the cost model's predictions and the paper's figures."""

from docs_paper import PAPER, PAPER_FORECASTS, PAPER_PRESETS, PAPER_QWEN, PAPERS, QWEN_STOCK
from docs_results import default_steps, load, table, to_default


def plan(name: str) -> str:
    from specedit.config import STOCK_STEPS
    from specedit.cost.flops import MODELS
    from specedit.cost.flops import plan as predict

    rows = []
    for preset, (clock, flops) in PAPER.items():
        ours = [predict(preset, "flux-kontext", 1024, 1024, share) for share in (0.1, 0.2, 0.4)]
        both = [f"{r['flops_ratio_50']:.2f} ({r['flops_ratio']:.2f})" for r in ours]
        as_paper = predict(PAPER_PRESETS[preset], "flux-kontext", 1024, 1024, 0.2)["flops_ratio_50"]
        rows.append([preset, *both, f"{as_paper:.2f}", f"{flops:.2f}", f"{clock:.2f}"])
    header = ["preset", "10 % edited", "20 % edited", "40 % edited", "the paper's settings, 20 %", "paper, FLOPs"]
    header.append("paper, clock (A100)")
    return table(header, rows) + (
        f"\n\nFLOPs ratios to {STOCK_STEPS} stock steps, as the paper counts, and in brackets to "
        f"{MODELS['flux-kontext'].default_steps}, the pipeline's own default. Predicted by `specedit.flops.plan`, not "
        f"measured. The paper's settings are the presets {', '.join(PAPER_PRESETS.values())}; the last two columns are "
        "its own figures."
    )


def plan_models(name: str) -> str:
    """Every model's own step, `turbo` against 50 steps, and four steps against four."""
    from specedit.config import STOCK_STEPS, resolve
    from specedit.cost.flops import MODELS
    from specedit.cost.flops import plan as predict

    turbo = resolve("turbo", restore="reference")
    few, ultra = resolve("few-4"), resolve("ultra")
    rows = []
    for model, cost in MODELS.items():
        image = 2 * 64 * 64  # target and reference at 1024 x 1024
        first, both = cost.stock(image) / 1e12, cost.stock(image, 2) / 1e12
        step = f"{first:.0f}" + (f", then {both - first:.0f}" if cost.fixed_reference or cost.fixed_prefix else "")
        fast, four, least = (predict(config, model, 1024, 1024, 0.2) for config in (turbo, few, ultra))
        parts = [f"{stage['flops'] / four['flops']:.0%}" for stage in four["stages"]]
        own = cost.stock(image, few.nfe) / four["flops"]
        both = [f"{run['flops_ratio_50']:.1f} ({run['flops_ratio']:.1f})" for run in (fast, least)]
        rows.append([f"`{model}`", step, str(cost.default_steps), *both, f"{own:.2f}", *parts])
    header = ["model", "T a stock step", "its own steps", "`turbo`", "`ultra`", f"`few-4`, to {few.nfe} steps",
              "of these: draft", "coarse", "mixed"]  # fmt: skip
    return table(header, rows) + (
        '\n\nFLOPs ratios at 1024 x 1024 with one reference, 20 % edited, `restore="reference"`: to '
        f"{STOCK_STEPS} steps, in brackets to the model's own, and of `few-4` to {few.nfe} stock steps. Predicted by "
        "`specedit.flops.plan`, not measured."
    )


def plan_qwen(name: str) -> str:
    from dataclasses import replace

    from specedit.config import STOCK_STEPS, presets
    from specedit.cost.flops import MODELS, transformer_flops
    from specedit.cost.flops import plan as predict

    cost = MODELS["qwen-image-edit"]
    image = 2 * 64 * 64  # target and reference at 1024 x 1024
    step, theirs = cost.stock(image) / 1e12, QWEN_STOCK / STOCK_STEPS
    needed = next(n for n in range(0, 100_000, 10) if transformer_flops(cost.config, n) >= theirs * 1e12 / cost.passes)
    words = replace(cost, text_tokens=cost.text_tokens - cost.vision_tokens, vision_tokens=0)

    def ratio(preset: str, share: float = 0.2, model=cost, **change) -> float:
        return predict(replace(presets[PAPER_PRESETS[preset]], **change), model, 1024, 1024, share)["flops_ratio_50"]

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
        "All with the paper's settings, the presets " + ", ".join(PAPER_PRESETS.values()) + ". Predicted by "
        "`specedit.flops.plan`, not measured; the last two columns are the paper's.",
    ]
    return table(header, rows) + "\n\n" + paragraphs[0] + "\n\n" + "\n".join(paragraphs[1:5]) + "\n\n" + paragraphs[5]


def share_of_draft(preset: str) -> float:
    from specedit.cost.flops import plan as predict

    run = predict(PAPER_PRESETS[preset], "qwen-image-edit", 1024, 1024, 0.2)
    return run["stages"][0]["flops"] / run["flops"]


def modulation(name: str) -> str:
    """Weights that only make modulation, and how often a run reads them."""
    from specedit.config import resolve
    from specedit.cost.flops import MODELS
    from specedit.cost.flops import plan as predict

    rows = []
    for model in MODELS:
        made = predict(resolve("turbo", restore="reference"), model, 1024, 1024, 0.2)["modulation"]
        rows.append([
            f"`{model}`", f"{made['weight_bytes'] / 1e9:.2f}", f"{made['reads']}", f"{made['reads_once']}",
            f"{made['bytes_less'] / 1e9:.1f}", f"{made['kept_bytes'] / 1e6:.1f}",
        ])  # fmt: skip
    header = ["model", "GB of weights", 'reads, `"step"`', 'reads, `"once"`', "GB less a call", "MB kept"]
    return table(header, rows) + (
        '\n\n`turbo` with `restore="reference"`, one edit in bf16. Predicted by `specedit.flops.plan`, not measured.'
    )


def roofline(name: str) -> str:
    from specedit.config import STANDARD_RESTORES, resolve
    from specedit.cost.roofline import GPUS, predict_roofline

    rows = []
    for model, paper in PAPERS.items():
        for preset in paper:
            for restore in STANDARD_RESTORES:
                config = resolve(preset, restore=restore)
                plans = [predict_roofline(config, model, 1024, 1024, 0.2, gpu) for gpu in GPUS]
                ratios = [f"{p['clock_ratio_50']:.2f} ({p['quotient']:.2f})" for p in plans]
                both = [f"{plans[0][name]:.2f}" for name in ("flops_ratio_50", "flops_ratio")]
                rows.append([model, preset, restore, *both, *ratios])
    text = (
        "\n\nPredicted, not measured: clock ratios over 50 stock steps if every operator ran at its roofline, and in "
        "brackets their quotient by the FLOPs ratio. Encoding, verification and decoding are in them. "
    )
    peaks = "; ".join(f"{n}: {g.flops / 1e12:.0f} TFLOP/s, {g.bandwidth / 1e12:.2f} TB/s" for n, g in GPUS.items())
    header = ["model", "preset", "restore", "FLOPs ratio to 50", "to its default steps", *GPUS]
    return table(header, rows) + text + f"Published peaks: {peaks}."


def forecast_plan(name: str) -> str:
    from specedit.config import resolve
    from specedit.cost.flops import plan as predict

    plain = predict("balanced", "flux-kontext", 1024, 1024, 0.2)["flops_ratio_50"]
    rows = [["none", "1.00", "1.00", "1.00", f"{plain:.2f}"]]
    for method in ("reuse", "taylor", "hermite", "foca", "freqca", "toca", "duca", "lesa"):
        fields = {"forecast": method}
        alone = [
            predict(resolve(steps=(0, 0, 50), forecast_interval=n, **fields), "flux-kontext", 1024, 1024, 0.2)
            for n in (4, 6, 9)
        ]
        fields |= {"forecast_order": 1} if method in ("taylor", "hermite", "freqca") else {}
        both = predict(resolve("balanced", forecast_interval=3, **fields), "flux-kontext", 1024, 1024, 0.2)
        rows.append([f"`{method}`", *(f"{p['flops_ratio_50']:.2f}" for p in alone), f"{both['flops_ratio_50']:.2f}"])
    header = ["`forecast`", "alone, N=4", "N=6", "N=9", "`balanced`, N=3"]
    explanation = (
        "FLOPs ratios to 50 stock steps, 1024 px, 20 % edited, predicted by `specedit.flops.plan`, not measured. With "
        "`balanced` the order is 1, lesa's 2, that of its weights; alone all are of order 2. Plain `balanced` has "
        f"{to_default('flux-kontext', plain)} to the {default_steps('flux-kontext')} steps that are the pipeline's own "
        "default, and every other ratio is less by the same factor."
    )
    return f"{table(header, rows)}\n\n{explanation}"


def forecast_paper(name: str) -> str:
    header = ["model", "combination", "NFE", "clock", "FLOPs"]
    return table(header, PAPER_FORECASTS) + "\n\nThe paper's figures (arXiv 2605.02152), not measured here."


def switches(name: str) -> str:
    """The effect of every exact and approximate switch on the presets of the goals."""
    from specedit.config import resolve
    from specedit.cost.roofline import predict_roofline

    every = {
        'every row of the last block (`attention="stock"`)': dict(attention="stock"),
        "as installed": {},
        '`draft_condition="small"`': dict(draft_condition="small"),
        "`draft_steps=8`": dict(draft_steps=8),
        "`draft_steps=0`": dict(draft_steps=0),
        '`locked="cached"`': dict(locked="cached"),
        "`reference_refresh=2`": dict(reference_refresh=2),
        "`reference_refresh=4`": dict(reference_refresh=4),
        "`guidance_range=(0.2, 0.9)`": dict(guidance_range=(0.2, 0.9)),
        "`guidance_range=(0.2, 1)`": dict(guidance_range=(0.2, 1)),
        "`reference_refresh=4, guidance_range=(0.2, 1)`": dict(reference_refresh=4, guidance_range=(0.2, 1)),
        "that, `draft_steps=0`": dict(draft_steps=0, reference_refresh=4, guidance_range=(0.2, 1)),
        "`ultra`": dict(draft_steps=0, locked="cached", uniform_stride=0),
    }
    asked = [("flux-kontext", 0.1), ("flux-kontext", 0.2), ("qwen-image-edit", 0.2)]
    rows = []
    for label, change in every.items():
        cells = []
        for model, share in asked:
            only_qwen = model == "flux-kontext" and change.keys() & {"draft_condition", "guidance_range"}
            if only_qwen and len(change) < 3:  # not on FLUX
                cells += ["-", "-"]
                continue
            config = resolve("turbo", restore="reference", **change)
            run = predict_roofline(config, model, 1024, 1024, share, "H100")
            cells += [f"{run['flops_ratio_50']:.2f}", f"{run['clock_ratio_50']:.2f}"]
        rows.append([label, *cells])
    header = ['`turbo`, `restore="reference"`']
    header += [f"{model}, {share:.0%}: {what}" for model, share in asked for what in ("FLOPs", "H100")]
    return table(header, rows) + (
        "\n\nPredicted, not measured: ratios to 50 stock steps at 1024 x 1024 with this share edited, of operations "
        "and of an H100's roofline seconds. The first two rows are exact; every other is an approximation whose error "
        "the sweep on the embedded editor measures."
    )


def kernel_loops(name: str) -> str:
    """What each attention kernel's main loop issues, and the bound on tensor-core use that follows."""
    from specedit_kernels import sass

    result = load(name)
    if result is None:
        return "*Not compiled yet.*"
    rows = []
    for row in result["rows"]:
        loop, bound = row["main_loop"], sass.bound(row["main_loop"])
        counts = [str(loop.get(kind, 0)) for kind in ("matrix", "mufu", "fma", "barrier", "all")]
        rows.append([row["arch"], row["name"], *counts, "" if bound is None else f"{bound:.0%}"])
    header = ["", "kernel", "matrix", "MUFU", "FMA", "barrier", "all", "tensor cores at most"]
    return table(header, rows) + (
        f"\n\nInstructions of a warp in one iteration of the main loop, by Triton {result['machine']['triton']}. "
        "Predicted, not measured: the last column is the bound that issue slots and the unit for exponentials set "
        "(`specedit_kernels.sass.bound`). Memory, latency and barriers lower it."
    )


def host_time(name: str) -> str:
    """Host time of a call of each kernel up to its launch, beside an earlier version's in the same run."""
    result = load(name)
    if result is None:
        return "*Not measured yet.*"
    rows = []
    for row in result["rows"]:
        old = row["us_before"]
        rows.append(
            [row["call"], f"{row['us']:.0f}", *(["", ""] if old is None else [f"{old:.0f}", f"{old / row['us']:.1f}x"])]
        )
    return table(["call", "us", "us before", "ratio"], rows) + (
        f"\n\nMicroseconds of the calling thread on a CPU, torch {result['machine']['torch']}, over a driver that "
        "runs nothing, beside a version that prepared nothing: the ratio counts, not the time. A packed call without a "
        "plan has a second launch, which orders its query blocks."
    )

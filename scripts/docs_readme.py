"""The README's tables: what SpecEdit gives, what has been measured on a GPU, and what the two commands cost."""

import docs_results
from docs_cases import clock_ratio, compared
from docs_results import default_steps, edited_by, load, machines, number, table, where

from specedit.config import resolve

FEW_STEPS = 8  # models with so many steps or fewer take a preset for few
SHARE = 0.2  # of the picture, edited
NEAR = 1 / 8  # how far stock's steps may be from the NFE to count as "as many", as a share
SHOWN = ("balanced", "fast", "turbo")  # docs/benchmarks.md has the others
NAMES = {"kontext": "Kontext", "qwen": "Qwen"}


def gains(name: str) -> str:
    """The presets of `SHOWN` in the quality files against stock's default steps and as many steps."""
    files = sorted(docs_results.RESULTS.glob(f"{name.removesuffix('.json')}*-512.json"))
    if not files:
        return "*not measured yet*"
    results = [compared(file.name) for file in files]
    texture = any("texture_distance" in row["mean"] for result in results for row in result["rows"])
    rows = [row for result in results for row in _gains_of(result, texture)]
    header = [
        "embedded editor, variant", "NFE", "success", *(["texture"] if texture else []), "keep dB",
        "FLOPs vs default", "clock vs default",
        "FLOPs vs as many", "as many: success", "as many: clock",
    ]  # fmt: skip
    measured = ", ".join(f"`{file.name}`" for file in files)
    measured_on = " and ".join(sorted({where(machine) for result in results for machine in machines(result)}))
    notes = "".join(f"\n\n`{file.name}`: {r['note']}" for file, r in zip(files, results) if r["note"])
    return table(header, rows) + (
        f"{notes}\n\nMeasured on {measured_on}: {measured} in `benchmarks/results`. Ratios above 1 are savings."
    )


def _gains_of(result: dict, texture: bool) -> list[list[str]]:
    """Rows of one editor. `texture`: with a column for the texture distance, which not every file has."""
    editor = edited_by(result)
    stock = {row["steps"]: row for row in result["rows"] if row["variant"].startswith("stock-")}
    steps = default_steps(editor)
    own = stock.get(steps)
    rows = []
    if own is not None:
        name = f"{NAMES[editor]}, stock, its default steps"
        rows.append([name, str(steps), *_scores(own["mean"], texture), "1.00", _clock(own, own), *"---"])
    for row in sorted((r for r in result["rows"] if r.get("preset") in SHOWN), key=lambda r: -r["mean"]["flops"]):
        mean, nfe = row["mean"], row["nfe"]
        near = min(stock, key=lambda count: abs(count - nfe))
        many = stock[near] if abs(near - nfe) <= NEAR * nfe else None
        step = next(r["mean"]["flops"] / count for count, r in stock.items())  # every stock step costs the same
        against = ["-", "-"] if own is None else [f"{own['mean']['flops'] / mean['flops']:.2f}", _clock(own, row)]
        rows.append(
            [f"{NAMES[editor]}, `{row['preset']}`, {row['restore']}", str(nfe), *_scores(mean, texture), *against,
             f"{nfe * step / mean['flops']:.2f}",
             "-" if many is None else f"{many['mean']['success']:.1%} ({near} steps)",
             "-" if many is None else _clock(many, row)]
        )  # fmt: skip
    return rows


def _clock(stock: dict, row: dict) -> str:
    return number(clock_ratio(stock["cases"], row["cases"]), ".2f")


def _scores(mean: dict, texture: bool) -> list[str]:
    distance = [number(mean.get("texture_distance"), ".2f")] if texture else []
    return [f"{mean['success']:.1%}", *distance, f"{mean['keep_psnr']:.1f}"]


def supported():
    """(model, title, pipelines) of every model whose costs are known, as its adapters state them."""
    from specedit.cost.tables import MODELS
    from specedit.models.registry import released_models

    for model in MODELS:
        stated = [(kind, one) for kind, each in released_models().items() for one in each if one.cost == model]
        yield model, stated[0][1].title, [kind for kind, _ in stated]


def models(name: str) -> str:
    """Every supported model with what it saves against its own default steps, by count."""
    from specedit.cost.flops import MODELS
    from specedit.cost.flops import plan as predict

    rows = []
    for model, title, classes in supported():
        steps = MODELS[model].default_steps
        few = steps <= FEW_STEPS
        chosen = ["few-4"] if few else ["turbo", "ultra"]
        runs = [predict(resolve(preset, restore="reference"), model, 1024, 1024, SHARE) for preset in chosen]
        saved = [f"{run['flops_ratio']:.1f}x" for run in runs]
        rows.append(
            [
                title,
                ", ".join(f"`{one}`" for one in classes),
                str(steps),
                *(["-", "-", *saved] if few else [*saved, "-"]),
            ]
        )
    header = ["model", "pipeline", "its own steps", "`turbo`", "`ultra`", "`few-4`"]
    return table(header, rows) + (
        f"\n\nFLOPs saved against the model's own default at 1024 x 1024 with one reference, {SHARE:.0%} edited, "
        '`restore="reference"`. Predicted by `specedit.flops.plan`, not measured.'
    )


def gpu_state(name: str) -> str:
    """One sentence: on which GPUs something was measured."""
    files = sorted(docs_results.RESULTS.glob("*.json"))
    gpus = sorted({gpu for file in files for m in machines(load(file.name)) if (gpu := m.get("gpu"))})
    if not gpus:
        return "**Nothing has been measured on a GPU yet.** Every measured figure in this repository comes from a CPU."
    return f"Measured on {', '.join(gpus)}; [docs/benchmarks.md](docs/benchmarks.md) has the figures."


def setup(name: str) -> str:
    """Minutes and GB of every step from the clone to the demo."""
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = [[r["step"], _minutes(r["seconds"]), f"{r['bytes'] / 1e9:.2f}"] for r in result["rows"]]
    seconds, held = (sum(r[key] for r in result["rows"]) for key in ("seconds", "bytes"))
    m = result["machine"]
    return table(["step", "minutes", "GB on disk"], [*rows, ["total", _minutes(seconds), f"{held / 1e9:.2f}"]]) + (
        f"\n\nMeasured on {m['cpu']}, {m['threads']} threads, beside other work (load {result['load']:.1f}), with "
        f"torch {m['torch']}, {m['date']}: `{result['command']}` wrote `benchmarks/results/{name}`."
    )


def test_times(name: str) -> str:
    """What the test commands take."""
    result = load(name)
    if result is None:
        return "*not measured yet*"
    rows = [[f"`{r['command']}`", _minutes(r["seconds"]), f"{r['tests']:,}"] for r in result["rows"]]
    return table(["command", "minutes", "tests"], rows)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"

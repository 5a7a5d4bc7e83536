"""Tables of docs/scale.md: machines for many pictures, from the plan, and measured throughput."""

from docs_results import default_steps, load, number, source, table

MILLION, DAY = 1_000_000, 86_400
SIDE, EDITED = 1024, 0.2
GPU = "H100"  # of the table by count
COUNTS = (1, 8, 64)
FILE = 2  # MB of a picture
EDITORS = ("flux-kontext", "qwen-image-edit")
SETTINGS = {"stock": None, "`balanced`": {}, '`turbo`, `restore="reference"`': {"restore": "reference"}}


def runs():
    """(model, setting, {GPU: (TFLOPs, seconds of a picture)}) of every row."""
    from specedit.config import resolve
    from specedit.cost.flops import plan
    from specedit.cost.roofline import GPUS, predict_roofline

    for model in EDITORS:
        for label, changes in SETTINGS.items():
            config = resolve("turbo" if changes else "balanced", **(changes or {}))
            each = {}
            for gpu in GPUS:
                run = predict_roofline(config, model, SIDE, SIDE, EDITED, gpu)
                flops = plan(config, model, SIDE, SIDE, EDITED)["flops"]
                seconds = run["seconds"]
                if changes is None:
                    flops, seconds = flops * run["flops_ratio"], seconds * run["clock_ratio"]
                each[gpu] = flops / 1e12, seconds
            yield model, f"{label}, {default_steps(model)} steps" if changes is None else label, each


def machines(name: str) -> str:
    """GPUs for a million pictures a day."""
    rows, gpus = [], []
    for model, setting, each in runs():
        gpus = list(each)
        needed = [f"{seconds * MILLION / DAY:,.1f}" for _, seconds in each.values()]
        rows.append([model, setting, f"{each[GPU][0]:,.0f}", f"{each[GPU][1]:.2f}", *needed])
    header = ["model", "setting", "TFLOPs a picture", f"seconds on one {GPU}", *(f"{gpu}s" for gpu in gpus)]
    return table(header, rows) + (
        f"\n\nGPUs for {MILLION:,} pictures a day at {SIDE} x {SIDE}, {EDITED:.0%} edited. {_PREDICTED} At {FILE} MB "
        f"for each picture read and each written, the files take {2 * FILE * MILLION / DAY:.0f} MB a second."
    )


def count(name: str) -> str:
    """Pictures a day by the number of GPUs."""
    rows = []
    for model, setting, each in runs():
        seconds = each[GPU][1]
        rows.append(
            [model, setting, *(f"{number * DAY / seconds:,.0f}" for number in COUNTS),
             *(f"{MILLION * seconds / number / DAY:,.1f}" for number in COUNTS)]
        )  # fmt: skip
    header = ["model", "setting", *(f"{n} {GPU}: a day" for n in COUNTS), *(f"{n}: days a million" for n in COUNTS)]
    return table(header, rows) + f"\n\nPictures at {SIDE} x {SIDE}, {EDITED:.0%} edited. {_PREDICTED}"


_PREDICTED = (
    "Predicted by the roofline of `specedit bench plan`, not measured: no GPU makes more. One that reaches half of its "
    "roofline makes half as many."
)


def throughput(name: str) -> str:
    result = load(name)
    if result is None:
        return f"*not measured yet*: `python -m benchmarks.throughput --out benchmarks/results/{name}`"
    rows = [
        [r["case"], f"{r['rows']}", f"{r['pictures_per_minute']:.1f}", f"{r['seconds_a_row']:.2f}",
         f"{r['seconds']:.0f}", f"{r['other_seconds']:.0f}", number(r.get("load"), ".1f")]
        for r in result["rows"]
    ]  # fmt: skip
    header = [
        "case",
        "rows",
        "pictures a minute",
        "seconds a row",
        "seconds in all",
        "of these not editing",
        "load before",
    ]
    return table(header, rows) + source(result, name)

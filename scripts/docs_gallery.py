"""The gallery's pictures with what each edit cost, from the files of `benchmarks.gallery`."""

import docs_results
from docs_readme import NAMES
from docs_results import edited_by, load, source, table


def gallery(name: str) -> str:
    """Every task with the picture of each editor and one table. `name`: how the files begin."""
    files = sorted(docs_results.RESULTS.glob(f"{name.removesuffix('.json')}-*.json"))
    results = {edited_by(result): result for file in files if (result := load(file.name)) is not None}
    if not results:
        return "*not measured yet*"
    tasks = {row["task"]: row["prompt"] for result in results.values() for row in result["rows"]}
    parts = [_task(task, prompt, results) for task, prompt in tasks.items()]
    return "\n\n".join(parts) + "".join(source(load(file.name) or {}, file.name) for file in files)


def _task(task: str, prompt: str, results: dict[str, dict]) -> str:
    """One task: its prompt as a heading, a picture of each editor, and the table."""
    lines = [f"## {prompt[0].upper()}{prompt[1:]}"]
    columns = []
    for editor, result in results.items():
        rows = [row for row in result["rows"] if row["task"] == task]
        if not rows:
            continue
        file = f"images/gallery-{editor}-{task}.jpg"
        alt = f"{NAMES[editor]}: “{prompt}” by stock and by four settings, and where each looked"
        lines.append(f"**{NAMES[editor]}**\n\n[![{alt}]({file})]({file})")
        columns.append((editor, rows))
    names = [_setting(row) for row in columns[0][1]]
    header = ["setting", *(f"{NAMES[editor]} {what}" for editor, _ in columns for what in _KINDS)]
    cells = [[name, *(text for _, rows in columns for text in _cells(rows[i]))] for i, name in enumerate(names)]
    return "\n\n".join([*lines, table(header, cells)])


_KINDS = ("NFE", "FLOPs ratio", "edited", "keep dB")


def _setting(row: dict) -> str:
    """The row's name; stock's steps stand in a column."""
    return "stock, its own steps" if row["variant"].startswith("stock") else row["variant"]


def _cells(row: dict) -> list[str]:
    draft = f" + {row['draft_steps']}" if row["draft_steps"] else ""
    keep = "-" if row["keep_psnr"] is None else f"{row['keep_psnr']:.1f}"
    return [f"{row['nfe']}{draft}", f"{row['flops_ratio']:.2f}", f"{row['edit_fraction']:.0%}", keep]

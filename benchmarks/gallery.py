"""The pictures of the gallery page: one task of every kind and two textures, edited by presets with both restores.

    python -m benchmarks.gallery --pictures docs/images --out benchmarks/results/gallery-kontext.json

The tasks are the first seeds of their kinds, whatever the editors make of them. Each editor's edits of a task are one
picture, `gallery-EDITOR-KIND.jpg`: below every edit stand the cells that were computed at full resolution, bright.
The results file has what each edit cost and how near it is to the target.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from benchmarks.method_gallery import Form, run, sheet
from benchmarks.scores import editor, some, whose
from specedit import micro
from specedit.cli.bounds import check_size
from specedit.evaluation import results
from specedit.io.files import check_folder, check_writable, replacing
from specedit.micro.editors import editor_named
from specedit.micro.evaluation import score, stock_flops
from specedit.pipelines import EDITORS
from specedit.report_comparison import where_it_looked

PRESETS = (("balanced", "full"), ("balanced", "reference"), ("turbo", "reference"), ("ultra", "reference"))
SEEDS = (1, 2, 3, 7, 5, 4)  # the first of add, remove, recolor, shape, background and greyscale
TEXTURES = (1, 2)
FORM = Form(tile=208, head=32, side=92, letters=15, gap=4)
LARGEST = 300_000  # bytes of a picture


def variants(model: str) -> dict[str, dict[str, Any]]:
    """The columns of a picture: stock with the pipeline's own steps, then presets, for `method_gallery.run`."""
    steps = editor_named(model).default_steps
    every: dict[str, dict[str, Any]] = {f"stock, {steps} steps": {"group": "stock", "steps": steps}}
    for preset, restore in PRESETS:
        every[f"{preset}, {restore}"] = {"group": "specedit", "preset": preset, "fields": {"restore": restore}}
    return every


def tasks(size: int) -> dict[str, micro.scenes.Case]:
    """The tasks by the names that their pictures have."""
    cases = {case.kind: case for case in (micro.scenes.sample(seed, size) for seed in SEEDS)}
    return cases | {f"texture-{seed}": micro.scenes.sample(seed, size, "texture") for seed in TEXTURES}


def edit(pipe: Any, model: str, case: micro.scenes.Case, name: str) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Edit one task by every variant: the picture, and the rows of the file."""
    every, rows = variants(model), []
    edits, looks = [case.source], [case.target]
    steps = editor_named(model).default_steps
    stock = stock_flops(pipe, case, steps)
    for variant, settings in every.items():
        image, report = run(pipe, settings, case)
        edits.append(image)
        looks.append(image if report is None else where_it_looked(image, report))
        cost = dict(nfe=steps, draft_steps=0, flops=stock, edit_fraction=1.0)
        if report is not None:
            cost = {field: getattr(report, field) for field in cost}
        row = dict(model=model, task=name, prompt=case.prompt, variant=variant)
        rows.append(row | cost | dict(flops_ratio=stock / cost["flops"]) | score(image, case))
    picture = sheet(["input", *every], [("edit", edits), ("a right answer; where it looked", looks)], FORM)
    return picture, rows


def save(picture: Image.Image, path: Path) -> None:
    """Write a JPEG of the best quality that takes at most `LARGEST` bytes."""
    for quality in (90, 85, 80, 70, 60):
        with replacing(path) as part:
            picture.save(part, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            return
    raise SystemExit(f"{path}: expected at most {LARGEST:,} bytes, got {path.stat().st_size:,}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=EDITORS[0], choices=EDITORS, help="the embedded editor")
    parser.add_argument("--size", type=int, default=256, help="side in pixels, 128 to 512")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="some of the tasks")
    args = parser.parse_args(arguments)
    check_size(args.size, 128, 512)
    check_writable("--out", args.out)
    check_folder("--pictures", args.pictures)
    cases = some(tasks(args.size), args.only)
    pipe, rows = editor(args.model), []
    for name, case in tqdm(cases.items(), desc=args.model):
        picture, made = edit(pipe, args.model, case, name)
        save(picture, args.pictures / f"gallery-{args.model}-{name}.jpg")
        rows += made
    command = f"python -m benchmarks.gallery --model {args.model} --size {args.size} --pictures docs/images"
    results.write(args.out, command, rows, of=whose(args))


if __name__ == "__main__":
    main()

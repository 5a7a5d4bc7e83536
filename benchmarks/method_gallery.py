"""Eight tasks, every method at about 5x fewer FLOPs, side by side; and where each looked on one of them.

    python -m benchmarks.method_gallery --table benchmarks/results/methods-512.json --out docs/images

The table says which setting of a method is nearest to the ratio. Two pictures are written: `methods-gallery.jpg` and
`methods-where.jpg`, in which cells that a method computed at full resolution are bright.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from benchmarks.methods import set_up, variants
from benchmarks.scores import editor
from specedit import micro, uninstall
from specedit.api.installing import last_report
from specedit.config import STOCK_STEPS
from specedit.micro.editors import editor_of

RATIO = 5.0
SEEDS = (3, 6, 7, 9, 12, 17)  # of the usual tasks; two textures come after them


def nearest(rows: list[dict[str, Any]], ratio: float = RATIO) -> list[str]:
    """Of every method, the variant whose FLOPs ratio to 50 stock steps is nearest to `ratio`, in the table's order.

    Stock is one of them. SpecEdit gives one for each restore.
    """
    whole = next(row["mean"]["flops"] for row in rows if row["variant"] == f"stock-{STOCK_STEPS}")
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        away = abs(whole / row["mean"]["flops"] - ratio)
        kind = row["variant"].rpartition("-")[2] if row["group"] == "specedit" else row["variant"].split()[0]
        kind = "stock" if row["group"] == "stock" else kind
        if row["group"] != "idea" and (kind not in best or away < best[kind][0]):
            best[kind] = (away, row["variant"])
    return [row["variant"] for row in rows if row["variant"] in {name for _, name in best.values()}]


def shade(picture: Image.Image, cells: torch.Tensor) -> Image.Image:
    """The picture, dark outside the cells (h, w) bool."""
    mask = Image.fromarray(cells.to(torch.uint8).mul(255).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size), 0.75), mask)


@dataclass(frozen=True)
class Form:
    """Pixels of a sheet: a picture's side, the columns' names, the texts before the lines, and the letters.

    gap: white at the right and lower edge of each picture, which is cut off there.
    """

    tile: int
    head: int
    side: int
    letters: int
    gap: int = 0


FORM = Form(tile=128, head=26, side=150, letters=11)


def sheet(columns: list[str], lines: list[tuple[str, list[Image.Image]]], form: Form = FORM) -> Image.Image:
    """Lines of pictures with a text before each, below the columns' names."""
    font = ImageFont.load_default(form.letters)
    tile, head, side = form.tile, form.head, form.side
    made = Image.new("RGB", (side + tile * len(columns), head + tile * len(lines)), "white")
    draw = ImageDraw.Draw(made)
    for i, name in enumerate(columns):
        draw.text((side + i * tile + 4, 6), name[:20], "black", font)
    for j, (text, pictures) in enumerate(lines):
        draw.text((6, head + j * tile + 8), _wrapped(text, 2 * side // form.letters - 5), "black", font)
        for i, picture in enumerate(pictures):
            sized = picture.resize((tile, tile), Image.Resampling.LANCZOS)
            made.paste(sized.crop((0, 0, tile - form.gap, tile - form.gap)), (side + i * tile, head + j * tile))
    return made


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def run(pipe: Any, settings: dict[str, Any], case: micro.scenes.Case) -> tuple[Image.Image, Any]:
    """The edit of one variant, and its report."""
    call = editor_of(pipe).arguments(case.source) | {"generator": torch.Generator().manual_seed(case.seed)}
    call |= {"num_inference_steps": settings["steps"]} if "steps" in settings else {}
    set_up(pipe, settings)
    image = pipe(image=case.source, prompt=case.prompt, **call).images[0]
    report = last_report(pipe)
    uninstall(pipe)
    return image, report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="result file of benchmarks.methods")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--textures", type=int, nargs="*", default=(1, 2), help="seeds of texture tasks")
    args = parser.parse_args(arguments)
    table = json.loads(args.table.read_text())
    size, every = table["of"]["size"], variants()
    chosen = [name for name in nearest(table["rows"]) if name in every]
    pipe = editor(table["of"]["model"])
    cases = [micro.scenes.sample(seed, size) for seed in args.seeds]
    cases += [micro.scenes.sample(seed, size, "texture") for seed in args.textures]
    lines, where = [], []
    for case in tqdm(cases):
        made = [run(pipe, every[name], case) for name in chosen]
        lines.append((case.prompt, [case.source, case.target, *(image for image, _ in made)]))
        if case is cases[0]:
            looked = [
                (name, shade(image, report.expand_mask[0]))
                for name, (image, report) in zip(chosen, made, strict=True)
                if report is not None and report.expand_mask is not None
            ]
            where.append((case.prompt, [case.source, *(picture for _, picture in looked)]))
            names = ["source", *(name for name, _ in looked)]
    sheet(["source", "a right answer", *chosen], lines).save(args.out / "methods-gallery.jpg", quality=50)
    sheet(names, where).save(args.out / "methods-where.jpg", quality=85)


if __name__ == "__main__":
    main()

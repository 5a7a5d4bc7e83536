"""Edits in a row on the embedded editor: what stays of the pixels that none was to change, and what is encoded.

    python -m benchmarks.session --scenes 8 --size 256 --out benchmarks/results/session-256.json

Each scene's objects are recoloured in turn, every edit on the last result. `keep_psnr` is in dB to the scene, over the
pixels that none of these edits was to change (all their masks, dilated by 16 px): the same pixels after the first edit
as after the last. An edit of the wrong place counts there. `haze_psnr` is over the pixels that no report of the
session calls edited, likewise the same after each edit, and `untouched` is their share: None without any. `success`:
inside the object, the result is at least 18 dB from the colour that was asked for. The
variants make the same edits with the same seeds: "masked" has the object's mask as `edit_mask`
and "found" has none, both with `keep_pixels`; "all pixels" keeps none. At the end of each, the last edit is made once
more on the same picture, with another seed: the row with `again`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import specedit
from benchmarks.scores import editor
from specedit.cost.tables import TOKEN_PIXELS
from specedit.evaluation import results
from specedit.evaluation.metrics import psnr
from specedit.micro import scenes
from specedit.micro.evaluation import MARGIN, NEAR, arguments, grow
from specedit.micro.loading import identity
from specedit.micro.render import Thing, coverage
from specedit.micro.vocabulary import COLOURS
from specedit.run_report import RunReport

CELL = 2 * TOKEN_PIXELS
FIRST = 30_000  # seeds of the scenes, beyond those of other tables
VARIANTS = {  # what `install` and every edit are given
    "masked": dict(keep_pixels=True, masks=True), "found": dict(keep_pixels=True, masks=False),
    "all pixels": dict(keep_pixels=False, masks=False),
}  # fmt: skip


def chosen_scenes(count: int) -> Iterator[tuple[int, scenes.Scene]]:
    """Scenes of at least two objects, each the only one of its shape, which names it whatever its colour."""

    def fits(seed: int) -> bool:
        shapes = [thing.shape for thing in scenes.describe(seed, "recolor").before]
        return len(shapes) > 1 and len(set(shapes)) == len(shapes)

    seeds = filter(fits, itertools.count(FIRST))
    yield from ((seed, scenes.describe(seed, "recolor")) for seed in itertools.islice(seeds, count))


def recolourings(scene: scenes.Scene, count: int) -> list[Thing]:
    """The scene's objects in turn, each with a colour that it has not had lately."""
    made, names = [], list(COLOURS)
    for i in range(count):
        thing = scene.before[i % len(scene.before)]
        colour = names[(names.index(thing.colour) + 1 + i // len(scene.before)) % len(names)]
        made.append(replace(thing, colour=colour))
    return made


def kept_pixels(scene: scenes.Scene, size: int) -> np.ndarray:
    """(size, size) bool: what no recolouring of an object touches, without the margin."""
    return ~grow((coverage(scene.before, size, size) > 0).any(0).numpy(), MARGIN)


def edited_pixels(report: RunReport, size: int) -> np.ndarray:
    """(size, size) bool: the cells that a report calls edited; all where it has no mask."""
    if report.edit_mask is None:
        return np.ones((size, size), dtype=bool)
    return report.edit_mask[0].numpy().repeat(CELL, 0).repeat(CELL, 1)[:size, :size]


def succeeds(picture: np.ndarray, thing: Thing, mask: np.ndarray) -> bool:
    """Whether an object has its colour."""
    target = np.broadcast_to(np.array(COLOURS[thing.colour], dtype=np.uint8), picture.shape)
    return psnr(picture, target, mask) >= NEAR


class Encoders:
    """Counts the calls of a pipeline's encoders."""

    def __init__(self, pipe: Any):
        self.calls: Counter[str] = Counter()
        for name, module in (("prompt", pipe.text_encoder_2), ("picture", pipe.vae.encoder)):
            module.register_forward_pre_hook(lambda *_, name=name: self.calls.update([name]))

    def since(self) -> dict[str, int]:
        """Calls since the last question."""
        calls, self.calls = self.calls, Counter()
        return {f"{name}_encodings": calls[name] for name in ("prompt", "picture")}


def run(
    pipe: Any, encoders: Encoders, seed: int, scene: scenes.Scene, size: int, count: int, masks: bool
) -> list[dict]:
    """A row for every edit of a session on one scene, and one for its last edit again."""
    case = scenes.sample(seed, size, "recolor")
    session, keep = specedit.Session(pipe, case.source), kept_pixels(scene, size)
    source = np.asarray(case.source)

    def row(number: int, thing: Thing, again: bool) -> dict[str, Any]:
        encoders.since()
        generator = torch.Generator().manual_seed(seed + number + 1000 * again)
        covered, prompt = coverage([thing], size, size)[0].numpy(), f"make the {thing.shape} {thing.colour}"
        mask = covered > 0 if masks else None
        began = time.perf_counter()
        made = session.edit(prompt, generator=generator, edit_mask=mask, **arguments(case.source))
        seconds = time.perf_counter() - began
        report, picture = session.report, np.asarray(made)
        return dict(
            scene=seed, edit=number, again=again, prompt=prompt, keep_psnr=psnr(picture, source, keep),
            success=succeeds(picture, thing, covered == 1),
            edit_fraction=report.edit_fraction, draft_steps=report.draft_steps, **encoders.since(), seconds=seconds,
        )  # fmt: skip

    asked = recolourings(scene, count)
    rows = [row(number, thing, again=False) for number, thing in enumerate(asked, 1)]
    untouched = ~np.any([edited_pixels(edit.report, size) for edit in session.edits], axis=0)
    for each, edit in zip(rows, session.edits, strict=True):
        value = psnr(np.asarray(edit.picture), source, untouched)
        each |= dict(haze_psnr=None if np.isnan(value) else value, untouched=float(untouched.mean()))
    session.undo()
    return [*rows, row(count, asked[-1], again=True)]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="kontext", choices=["kontext"], help="the embedded editor")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(given)
    pipe, rows = editor(args.model), []
    encoders, found = Encoders(pipe), list(chosen_scenes(args.scenes))
    with tqdm(total=len(VARIANTS) * len(found) * (args.edits + 1)) as bar:
        for variant, how in VARIANTS.items():
            specedit.install(pipe, args.preset, keep_pixels=how["keep_pixels"], reuse_encodings=True)
            for seed, scene in found:
                made = run(pipe, encoders, seed, scene, args.size, args.edits, how["masks"])
                rows += [dict(variant=variant) | row for row in made]
                bar.update(len(made))
    command = (
        f"python -m benchmarks.session --scenes {args.scenes} --edits {args.edits} --size {args.size} "
        f"--preset {args.preset}"
    )
    results.write(args.out, command, rows, of=identity(args.model) | dict(size=args.size))


if __name__ == "__main__":
    main()

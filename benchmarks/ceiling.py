"""How many tasks can be solved at all: every edit is exact, and only what an object hid is guessed.

    python -m benchmarks.ceiling --cases 64 --size 512 --out benchmarks/results/ceiling-512.json

Removing or reshaping an object uncovers background that no picture shows. Biharmonic inpainting (Damelin and Hoang
2018, in scikit-image: pip install -e ".[bench]") fills it in; everything else is the target. An editor that guesses
photographs better may exceed this, but not by following the instruction.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from specedit.evaluation import results
from specedit.micro import scenes
from specedit.micro.evaluation import grow, score, summary
from specedit.micro.render import coverage

RIM = 2  # px around an object that its anti-aliased edge may tint


def guessed(scene: scenes.Scene, case: scenes.Case) -> Image.Image:
    """The target of `case`, with the edited object's place inpainted."""
    from skimage.restoration import inpaint_biharmonic

    if scene.kind not in ("remove", "shape"):
        return case.target
    width, height = case.source.size
    (hid,) = coverage(scene.before[:1], height, width).numpy()
    filled = inpaint_biharmonic(np.asarray(case.source) / 255, grow(hid > 0, RIM), channel_axis=-1)
    if scene.kind == "shape":
        (alpha,) = coverage(scene.after[:1], height, width).numpy()
        filled = filled + (np.array(scenes.rgb(scene.after[0].colour)) - filled) * alpha[..., None]
    return Image.fromarray((filled.clip(0, 1) * 255).round().astype(np.uint8))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    rows = []
    for seed in range(args.cases):
        scene, case = scenes.describe(seed), scenes.sample(seed, args.size)
        share = float(case.mask.mean())
        rows.append(dict(seed=seed, kind=case.kind, mask_share=share, **score(guessed(scene, case), case)))
    done = {"variant": "ceiling", "size": args.size, **summary(rows), "cases": rows}
    results.write(args.out, f"python -m benchmarks.ceiling --cases {args.cases} --size {args.size}", rows=[done])


if __name__ == "__main__":
    main()

"""How many of the tasks can be solved at all: every edit done exactly, only what an object hid has to be guessed.

    python -m benchmarks.ceiling --cases 64 --size 512 --out benchmarks/results/ceiling-512.json

Removing an object or changing its shape uncovers background that no picture shows. Here biharmonic inpainting (Damelin
and Hoang 2018, as scikit-image has it: pip install -e ".[bench]") fills it in from around, and all else is the target.
An editor with a better guess at photographs may do more; none can be expected to by following the words.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from specedit.evaluation import results
from specedit.micro import scenes
from specedit.micro.evaluation import grow, score, summary
from specedit.micro.render import coverage

RIM = 2  # px around an object that its anti-aliased edge may have tinted


def guessed(scene: scenes.Scene, case: scenes.Case) -> Image.Image:
    """The target of `case`, where the object that is edited stood filled in from around it."""
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

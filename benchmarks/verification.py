"""Recall and false alarms of verification by threshold, for a perfect draft.

    python -m benchmarks.verification --cases 48 --out benchmarks/results/verification.json

The draft is the true result drawn and encoded at a quarter of the side, so that only the comparison is measured: at
full size with the draft upsampled ("full"), and at the draft's own size ("draft"). Recall is the share of truly edited
cells above the threshold; false is the share of cells above it that neither changed nor touch one that did.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from specedit import micro
from specedit.config import SpecEditConfig
from specedit.evaluation import results
from specedit.layout import TokenGrid
from specedit.method import selectors as select
from specedit.method.adapter import EditState, Run
from specedit.method.selectors.semantic import Semantic
from specedit.micro import scenes
from specedit.micro.loading import identity
from specedit.models import adapter_of
from training.micro.families import family_of
from training.micro.train_editor import pack

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
LOCAL = ("recolor", "remove", "add", "shape")  # global edits change every cell


@torch.no_grad()
def scores(pipe, scene, size: int, verify_at: str) -> torch.Tensor:
    grid = TokenGrid(size // 16, size // 16)
    source, draft = (
        pack(family_of(pipe).latents(pipe.vae, image * 2 - 1))
        for image in (scenes.draw([scene], size, size)[0], scenes.draw([scene], size // 4, size // 4)[1])
    )
    state = EditState(
        grid=grid, noise=source, reference=source, reference_grid=grid, generator=None, text_tokens=0,
        branches=1, pixels_per_token=16,
    )  # fmt: skip
    run = Run(adapter_of(pipe), pipe, SpecEditConfig(verify_at=verify_at), state)
    score = Semantic().score(run, draft, grid.coarse(4))
    return select.to_cells(score)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="kontext", help="the embedded editor: kontext or qwen")
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipe = micro.load(args.model, device="cpu")
    rows = []
    for size in (256, 512):
        found: dict[str, tuple[list, list]] = {"full": ([], []), "draft": ([], [])}
        for i in tqdm(range(args.cases), desc=f"{size} px"):
            scene = scenes.describe(500 + i, LOCAL[i % len(LOCAL)])
            mask = scenes.draw([scene], size, size)[2]
            true = F.max_pool2d(mask[None].float(), 32)[0, 0] > 0
            near = F.max_pool2d(true[None, None].float(), 3, 1, 1)[0, 0] > 0
            for verify_at, (inside, outside) in found.items():
                score = scores(pipe, scene, size, verify_at)
                inside.append(score[true])
                outside.append(score[~near])
        for verify_at, (inside, outside) in found.items():
            inside, outside = torch.cat(inside), torch.cat(outside)
            for threshold in THRESHOLDS:
                recall, false = (float((s > threshold).float().mean()) for s in (inside, outside))
                rows.append(dict(size=size, verify_at=verify_at, threshold=threshold, recall=recall, false=false))
    command = f"python -m benchmarks.verification --model {args.model} --cases {args.cases}"
    results.write(args.out, command, rows, of=identity(args.model, "vae"))


if __name__ == "__main__":
    main()

"""Crops of the public-domain photographs that scikit-image ships, kept small inside the package.

`python -m specedit.micro.photos` recreates them (needs the `train` extra). Training never sees the photographs of
evaluation: whole pictures are held out, not crops.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FOLDER = Path(__file__).parent / "photographs"
SIDE = 256  # pixels a crop is stored at

# name: (left, top, side) of each crop in the original's pixels. All are CC0 or works of NASA.
CROPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "astronaut": ((0, 0, 256), (256, 0, 256), (0, 256, 256), (128, 60, 256), (230, 250, 260)),
    "chelsea": ((0, 0, 300), (60, 0, 256), (150, 0, 300), (180, 40, 240)),
    "hubble_deep_field": ((300, 200, 300),),
    "rocket": ((0, 0, 300), (170, 60, 300), (320, 120, 300), (0, 120, 300)),
    "brick": ((0, 0, 220),),
    "moon": ((0, 0, 400), (100, 100, 400)),
    # Held out for evaluation.
    "coffee": ((0, 0, 300), (100, 60, 330), (250, 50, 350), (200, 0, 400)),
    "camera": ((0, 0, 400), (200, 60, 300)),
}
HELD_OUT = ("coffee", "camera")
NAMES: tuple[str, ...] = tuple(f"{name}_{i}" for name, crops in CROPS.items() for i in range(len(crops)))
TRAINING: tuple[int, ...] = tuple(i for i, n in enumerate(NAMES) if n.rsplit("_", 1)[0] not in HELD_OUT)
EVALUATION: tuple[int, ...] = tuple(i for i in range(len(NAMES)) if i not in TRAINING)


@cache
def load() -> Tensor:
    """All crops, (n, 3, SIDE, SIDE) float32 in 0..1, in the order of `NAMES`."""
    images = [np.asarray(Image.open(FOLDER / f"{name}.jpg").convert("RGB")) for name in NAMES]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def write(folder: Path = FOLDER) -> None:
    """Cut the crops from scikit-image's files."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    for name, crops in CROPS.items():
        original = Image.fromarray(getattr(data, name)()).convert("RGB")
        for i, (left, top, side) in enumerate(crops):
            crop = original.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            crop.save(folder / f"{name}_{i}.jpg", quality=88)


if __name__ == "__main__":
    write()

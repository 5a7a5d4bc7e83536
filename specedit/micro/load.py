"""Reads the trained editor that travels with the package."""

from pathlib import Path
from typing import Any

import torch

WEIGHTS = Path(__file__).parent / "weights"


def load(name: str = "kontext", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A real pipeline with weights trained here, through `from_pretrained` on a directory; no network.

    Args:
        name: "kontext", a FluxKontextPipeline.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the package was installed without its weights.
    """
    if name != "kontext":
        raise ValueError(f'name: expected "kontext", got {name!r}')
    folder = WEIGHTS / name
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"the embedded editor's weights are missing: expected {folder}/model_index.json")
    from . import build

    pipe = build.load(folder, torch_dtype=dtype)
    return pipe.to(device)

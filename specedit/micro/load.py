"""Reads the trained editors that travel with the package."""

from pathlib import Path
from typing import Any

import torch

from .. import results
from .cpu import channels_last

WEIGHTS = Path(__file__).parent / "weights"


def identity(name: str, part: str = "") -> dict[str, Any]:
    """Whose numbers a results file holds: the editor's name, and the fingerprint of its weights or of a `part`'s."""
    return dict(model=name, weights=results.fingerprint(WEIGHTS / name / part))


def load(name: str = "kontext", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A real pipeline with weights trained here, through `from_pretrained` on a directory; no network.

    Args:
        name: "kontext", a FluxKontextPipeline, or "qwen", a QwenImageEditPipeline.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the package holds no weights of that editor.
    """
    from .family import named

    family = named(name)
    folder = WEIGHTS / name
    if not (folder / "model_index.json").exists():
        held = sorted(file.parent.name for file in WEIGHTS.glob("*/model_index.json"))
        raise FileNotFoundError(
            f"this package holds no weights of the editor {name!r}: expected {folder}/model_index.json, what "
            f"`python -m specedit.micro.train --model {name} --out runs/{name}` leaves in runs/{name}/editor; "
            f"it holds {', '.join(held) or 'none'}"
        )
    pipe = family.load(folder).to(device=device, dtype=dtype)  # versions of diffusers disagree about the loader's dtype
    if torch.device(device).type == "cpu":
        channels_last(pipe.vae)
    return pipe

"""Load the packaged editors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluation import results
from .editors import editor_named

WEIGHTS = Path(__file__).parent / "weights"
STUDENT = WEIGHTS / "kontext-lightning"  # the Kontext editor's few-step LoRA, for `load_lora_weights`


def identity(name: str, part: str = "") -> dict[str, Any]:
    """An editor's name and the fingerprint of its weights, or of one `part`, for results files."""
    return dict(model=name, weights=results.fingerprint(WEIGHTS / name / part))


def load(name: str = "kontext", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A real pipeline with weights trained here, read by `from_pretrained` from a directory; no network.

    Args:
        name: "kontext", a FluxKontextPipeline, or "qwen", a QwenImageEditPipeline.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the package has no weights of that editor.
    """
    editor = editor_named(name)
    folder = WEIGHTS / name
    if not (folder / "model_index.json").exists():
        held = sorted(file.parent.name for file in WEIGHTS.glob("*/model_index.json"))
        raise FileNotFoundError(
            f"this package holds no weights of the editor {name!r}: expected {folder}/model_index.json, what "
            f"`python -m training.micro.train --model {name} --out runs/{name}`, run in the repository, leaves in "
            f"runs/{name}/editor; it holds {', '.join(held) or 'none'}"
        )
    pipe = editor.load(folder).to(device=device, dtype=dtype)  # the loader's dtype argument differs between versions
    if torch.device(device).type == "cpu":
        channels_last(pipe.vae)
    return pipe


@torch.no_grad()
def channels_last(module: nn.Module) -> None:
    """Store the weights of 3-D convolutions channels-last, in place, without changing values.

    oneDNN gives a convolution's result the layout of its weight. The norms before Qwen's convolutions then read their
    channels contiguously. 2-D autoencoders were no faster.
    """
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last_3d)

"""What the trainer needs of each kind of editor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from specedit.micro.editors import Editor


@dataclass(frozen=True)
class Family:
    """The training half of one kind of editor, as a table of functions.

    `features` is whatever `text` returns and `velocity` takes: only the family looks into it.

    Attributes:
        editor: its runtime half: name, pipeline class, loader.
        build: of a seed, an untrained pipeline.
        save: of (pipe, folder), writes the pipeline in half precision.
        flat: of the autoencoder, one for images (B, 3, H, W) without a time axis.
        latents: of (vae, images), normalised latents (B, 16, H/8, W/8) float32.
        set_statistics: of (vae, latents), writes what `latents` normalises by.
        text_modules: of the pipeline, what is trained besides the transformer.
        encode_image: of (pipe, images (B, 3, H, W) in 0..1), the text encoder's image input; None if it has none.
        text: of (pipe, prompts, vision, device), features as the pipeline computes them, with gradients. `vision` is
            `encode_image`'s result, or None for text alone.
        probe_inputs: of features, tensors (B, D) or (B, n, D) from which the prompt should be readable.
        probe_widths: of the pipeline, the D of each of those.
        velocity: of (pipe, x, source, grid, sigma, features, at, **draw), the transformer's output (B, N, C) for packed
            tokens. They are the tokens `at` (N,) of the grid, or all of them for None.
        probed_blocks: of the transformer, an early, a middle and a late block. The early one is the last of the first
            `train_probes.DEPTH`.
        empty_prompts: share of training prompts replaced by an empty one, for guidance.
    """

    editor: Editor
    build: Callable[[int], Any]
    save: Callable[..., None]
    flat: Callable[[nn.Module], Any]
    latents: Callable[[nn.Module, Tensor], Tensor]
    set_statistics: Callable[[nn.Module, Tensor], None]
    text_modules: Callable[[Any], list[nn.Module]]
    encode_image: Callable[[Any, Tensor], Any]
    text: Callable[..., Any]
    probe_inputs: Callable[[Any], tuple[Tensor, ...]]
    probe_widths: Callable[[Any], tuple[int, ...]]
    velocity: Callable[..., Tensor]
    probed_blocks: Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module]]
    empty_prompts: float = 0.0

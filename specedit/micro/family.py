"""What the trainer and the evaluation must know of a kind of editor: a table of functions, one for each pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One kind of editor. `features` is whatever `text` makes and `velocity` takes: only the family looks into it.

    build(seed), load(folder, **kwargs), save(pipe, folder): the pipeline. flat(vae): the autoencoder as one of pictures
    (B, 3, H, W) without a time axis. latents(vae, images): normalised latents (B, 16, H/8, W/8) float32.
    set_statistics(vae, latents): write what `latents` normalises by. text_modules(pipe): what is trained beside the
    transformer. look(pipe, images): what the text encoder sees of pictures (B, 3, H, W) in 0..1, None if nothing.
    text(pipe, prompts, seen, device): features as the pipeline makes them, with gradients; seen=None: no pictures.
    readings(features): tensors (B, D) or (B, n, D) that should each tell what the prompt says, of `widths(pipe)`.
    velocity(pipe, x, source, grid, sigma, features, at, **draw): the transformer's output (B, N, C) for packed tokens,
    which are those `at` (N,) of the grid, None for all.
    asked_blocks(transformer): the blocks that the questions read, early, middle and late; the early one is the last of
    the first `train_ask.DEPTH`. empty: share of training prompts that are left empty, for guidance.
    arguments(image): of the pipeline's call. passes(pipe, case, call): the length of the sequence of each of a step's
    transformer calls. default_steps: the stock pipeline's own.
    """

    name: str
    pipeline: type
    build: Callable[[int], Any]
    load: Callable[..., Any]
    save: Callable[..., None]
    flat: Callable[[nn.Module], Any]
    latents: Callable[[nn.Module, Tensor], Tensor]
    set_statistics: Callable[[nn.Module, Tensor], None]
    text_modules: Callable[[Any], list[nn.Module]]
    look: Callable[[Any, Tensor], Any]
    text: Callable[..., Any]
    readings: Callable[[Any], tuple[Tensor, ...]]
    widths: Callable[[Any], tuple[int, ...]]
    velocity: Callable[..., Tensor]
    asked_blocks: Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module]]
    arguments: Callable[..., dict[str, Any]]
    passes: Callable[..., list[int]]
    default_steps: int
    empty: float = 0.0


def families() -> tuple[Family, ...]:
    """All of them."""
    from .family_kontext import KONTEXT
    from .family_qwen import QWEN

    return KONTEXT, QWEN


def named(name: str) -> Family:
    """The family "kontext" or "qwen".

    Raises:
        ValueError: another name.
    """
    for family in families():
        if family.name == name:
            return family
    raise ValueError(f'name: expected "kontext" or "qwen", got {name!r}')


def of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        TypeError: it is of neither.
    """
    for family in families():
        if isinstance(pipe, family.pipeline):
            return family
    known = " or ".join(family.pipeline.__name__ for family in families())
    raise TypeError(f"pipe: expected a {known}, got {type(pipe).__name__}")

"""Distils the Kontext editor into a Qwen editor that was initialised from it.

What could not be copied is the text: Qwen has another text encoder and no pooled prompt, which in FLUX modulates every
block, so that the words must act through attention. Both editors run on the same tasks at the same noise. The loss is
the distance between their outputs and, with decreasing weight, between their image tokens' states after every shared
block (hints, Romero et al. 2015; the widths are equal, so no projection is needed). Hints tell each block directly what
to make of the words; later other states may do better. Little of those states depends on the prompt, so the linear
probes are trained along here too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import family_kontext
from .families import family_of
from .inherit import GUIDANCE, block_pairs
from .loop import Log, Settings
from .probes import Probes
from .train_editor import (
    HIGH,
    HIGH_SHARE,
    PROBE_WEIGHTS,
    Batch,
    drop_prompts,
    learn,
    noise_levels,
    noised,
    token_weights,
)

START = 1 << 20  # first training seed; the editor's own training uses others
VARIANCE_FLOOR = 1e-3  # smallest variance of a channel, relative to the mean


@contextlib.contextmanager
def recorded_states(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the image tokens' states (B, n, width) after each of `blocks`, in the order of their calls."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _block, _inputs, out: states.append(out[1])) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def normalised_mse(got: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of (B, n, d), channels divided by `wanted`'s variance, tokens weighted by `weight` (B, n)."""
    variance = wanted.flatten(0, 1).var(0)
    variance = variance.clamp_min(VARIANCE_FLOOR * float(variance.mean()))
    error = ((got.float() - wanted) ** 2 / variance).mean(-1)
    return (error * weight).sum() / weight.sum()


def link_loss(
    pipe: Any,
    teacher: Any,
    batch: Batch,
    device: str,
    high: float = HIGH_SHARE[0],
    probes: Probes | None = None,
    hints: float = 1.0,
) -> dict[str, Tensor]:
    """Distillation losses: `states`, the mean over blocks, `velocity`, the output, and those of `probes`.

    `total` is the one to minimise; `states` has weight `hints` in it. Samples whose prompt is dropped for guidance are
    trained on the true velocity instead of the teacher's.

    Raises:
        ValueError: the teacher's output is the same everywhere.
    """
    family, n = family_of(pipe), len(batch.target)
    sigma = noise_levels(n, math.prod(batch.grid), high, pipe.scheduler.config, device=device)
    x, noise = noised(batch.target, sigma, device=device)
    call = (x, batch.source, batch.grid, sigma)
    pairs = block_pairs(pipe.transformer, teacher.transformer)
    with torch.no_grad(), recorded_states([theirs for _, theirs in pairs]) as wanted:
        words = family_kontext.text(teacher, batch.prompts, None, device)
        guidance = torch.full_like(sigma, GUIDANCE)
        right = family_kontext.velocity_at(teacher, *call, words, guidance, batch.at).float()
    if not right.var() > 0:
        raise ValueError("--like: expected a trained editor, got one whose output is the same everywhere")
    prompts, has_prompt = drop_prompts(batch.prompts, family, device=device)
    with recorded_states([ours for ours, _ in pairs]) as got:
        velocity = family.velocity(pipe, *call, family.text(pipe, prompts, batch.vision, device), batch.at)
    weight = token_weights(batch.edited)
    both = torch.cat([weight, torch.ones_like(weight)], 1)  # target and reference
    if has_prompt is not None:
        both = both * has_prompt[:, None]
        right = torch.where(has_prompt[:, None, None], right, noise - batch.target)
    states = [normalised_mse(ours, theirs.float(), both) for ours, theirs in zip(got, wanted, strict=True)]
    losses = dict(states=torch.stack(states).mean(), velocity=normalised_mse(velocity, right, weight))
    total = hints * losses["states"] + losses["velocity"]
    if probes is not None:
        losses |= probes.losses(x.shape[1], batch.labels, (sigma > HIGH).float(), weight, has_prompt)
        total = total + sum(PROBE_WEIGHTS[name] * loss for name, loss in losses.items() if name in PROBE_WEIGHTS)
    return losses | dict(total=total)


def train_link(pipe: Any, teacher: Any, probes: Probes, settings: Settings, log: Log) -> None:
    """Train for `settings.link_minutes`, from where the last run stopped.

    Raises:
        ValueError: the teacher's output is the same everywhere.
    """
    device = settings.device
    for part in (teacher.transformer, teacher.text_encoder, teacher.text_encoder_2):
        part.to(device).requires_grad_(False)

    def loss(batch: Batch, progress: float) -> dict[str, Tensor]:
        return link_loss(pipe, teacher, batch, device, probes=probes, hints=1 - progress)

    # Text is what has to be learned, and it does not depend on the size: start at small images unless it is known.
    sizes = settings if settings.follow else replace(settings, start=None)
    learn(pipe, [probes], sizes, log, "link", settings.link_minutes, loss, START)

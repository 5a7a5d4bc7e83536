"""Teaches a Qwen editor that took over a Kontext editor's blocks to do with its own words what that editor does.

What it could not take over is another text encoder's words and FLUX's pooled prompt, which turns every block by what is
asked for; here it has to come through attention. So both run on the same tasks at the same noise, and the loss is how
far apart they are: behind every block they share, in the picture tokens' states, and in what comes out (hints, Romero
et al. 2015; here teacher and student have the same width, so nothing stands between). Each block is told on the spot
what it should have made of the words, which the result alone tells only after all of them; less and less so, since with
words alone other states may do better. What a prompt asks for is little of those states, so the readings that every
training has beside it ask for it here too.
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
from .family import of
from .inherit import GUIDANCE, taken_over
from .questions import Questions
from .train_editor import ASK, HIGH, HIGH_SHARE, Batch, learn, left_empty, noise_levels, noised, token_weights
from .training import Log, Settings

START = 1 << 20  # tasks of another stretch than the editor's
FAINT = 1e-3  # channels of less than this share of the mean variance count no more than one of this share


@contextlib.contextmanager
def listening(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, every run of the model appends the picture tokens' states (B, n, width) behind each of `blocks`."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _block, _inputs, out: states.append(out[1])) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def apart(got: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean squared distance of `got` from `wanted`, both (B, n, d), each channel in units of its own variance over all
    tokens, with `weight` (B, n) for each token."""
    variance = wanted.flatten(0, 1).var(0)
    variance = variance.clamp_min(FAINT * float(variance.mean()))
    error = ((got.float() - wanted) ** 2 / variance).mean(-1)
    return (error * weight).sum() / weight.sum()


def link_loss(
    pipe: Any,
    teacher: Any,
    batch: Batch,
    device: str,
    high: float = HIGH_SHARE[0],
    questions: Questions | None = None,
    hints: float = 1.0,
) -> dict[str, Tensor]:
    """`states`: how far the picture tokens' states are from the teacher's, mean of all blocks; `velocity`: the output.

    With `questions` their losses too. Prompts that are left empty, as where a guided family is trained, have no
    teacher, and their velocity is the truth. `total` is what to train on; `states` weigh `hints` in it.

    Raises:
        ValueError: the teacher's output is the same everywhere.
    """
    family, n = of(pipe), len(batch.target)
    sigma = noise_levels(n, math.prod(batch.grid), high, pipe.scheduler.config, device=device)
    x, noise = noised(batch.target, sigma, device=device)
    call = (x, batch.source, batch.grid, sigma)
    pairs = taken_over(pipe.transformer, teacher.transformer)
    with torch.no_grad(), listening([theirs for _, theirs in pairs]) as wanted:
        words = family_kontext.text(teacher, batch.prompts, None, device)
        guidance = torch.full_like(sigma, GUIDANCE)
        right = family_kontext.velocity_at(teacher, *call, words, guidance, batch.at).float()
    if not right.var() > 0:
        raise ValueError("--like: expected a trained editor, got one whose output is the same everywhere")
    prompts, told = left_empty(batch.prompts, family, device=device)
    with listening([ours for ours, _ in pairs]) as got:
        velocity = family.velocity(pipe, *call, family.text(pipe, prompts, batch.seen, device), batch.at)
    weight = token_weights(batch.edited)
    both = torch.cat([weight, torch.ones_like(weight)], 1)  # target and reference
    if told is not None:
        both = both * told[:, None]
        right = torch.where(told[:, None, None], right, noise - batch.target)
    states = [apart(ours, theirs.float(), both) for ours, theirs in zip(got, wanted, strict=True)]
    losses = dict(states=torch.stack(states).mean(), velocity=apart(velocity, right, weight))
    total = hints * losses["states"] + losses["velocity"]
    if questions is not None:
        losses |= questions.losses(x.shape[1], batch.answers, (sigma > HIGH).float(), weight, told)
        total = total + sum(ASK[name] * loss for name, loss in losses.items() if name in ASK)
    return losses | dict(total=total)


def train_link(pipe: Any, teacher: Any, questions: Questions, settings: Settings, log: Log) -> None:
    """Train for `settings.link_minutes`, from where the last run stopped.

    Raises:
        ValueError: the teacher's output is the same everywhere.
    """
    device = settings.device
    for part in (teacher.transformer, teacher.text_encoder, teacher.text_encoder_2):
        part.to(device).requires_grad_(False)

    def loss(batch: Batch, progress: float) -> dict[str, Tensor]:
        return link_loss(pipe, teacher, batch, device, questions=questions, hints=1 - progress)

    # Words are what is new, and a prompt says the same at any size: small pictures first, but for whoever knows them.
    sizes = settings if settings.follow else replace(settings, start=None)
    learn(pipe, [questions], sizes, log, "link", settings.link_minutes, loss, START)

"""Trains the first blocks by the early probes, before the whole editor is trained.

A probe's loss reaches those blocks on a far shorter path than the drawn result does, and they are a third of the
transformer. Small images and a few minutes replace much longer training of the whole.

An editor that is already trained would forget the rest, since the later blocks are not part of that loss. There the
probes, which are not saved with it, are first fitted to the frozen editor. Then its first blocks learn what the probes
cannot read yet, while distillation keeps their outputs near the old ones.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cpu import autocast
from .families import family_of
from .first_blocks import only_first
from .loop import Clock, Log, Settings, fit, parameter_groups
from .probes import PROMPT_CLASSES, Probes
from .train_editor import PROBE_WEIGHTS, Batch, batches, editor_loss, noised

LARGEST = 128  # px; prompts do not depend on the size
PROBE_RATE = 5e-3  # learning rate of the probes alone
PROBE_SHARE = 0.2  # of the time, for fitting the probes to a frozen editor
DEPTH = 2  # number of first blocks that are trained
DISTIL_WEIGHT = 0.5  # weight of the first blocks' distance from their old outputs, in units of the outputs' variance
TASKS = {"probes": 1 << 19, "probe_distil": 3 << 18}  # first training seed of each part


def first_states(pipe: Any, batch: Batch, x: Tensor, sigma: Tensor, **draw) -> tuple[Tensor, Tensor]:
    """The first blocks' outputs for text (B, L, C) and image tokens (B, N, C)."""
    family, out = family_of(pipe), []
    hook = pipe.transformer.transformer_blocks[DEPTH - 1].register_forward_hook(lambda *call: out.append(call[-1]))
    try:
        with only_first(pipe.transformer, DEPTH):
            features = family.text(pipe, batch.prompts, batch.vision, x.device)
            family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at, **draw)
    finally:
        hook.remove()
    return out[0]


def _noise_uniformly(batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """The batch's targets (B, N, C) at uniformly drawn noise levels, and those levels (B,)."""
    sigma = torch.rand(len(batch.target), device=device)
    return noised(batch.target, sigma, device=device)[0], sigma


def probe_loss(pipe: Any, probes: Probes, batch: Batch, device: str) -> dict[str, Tensor]:
    """The losses of `Probes.early` after the first blocks, at uniform noise levels."""
    x, sigma = _noise_uniformly(batch, device)
    first_states(pipe, batch, x, sigma)
    return probes.early(x.shape[1], batch.labels)


def probe_distil_loss(pipe: Any, probes: Probes, batch: Batch, device: str, old: Any) -> dict[str, Tensor]:
    """`probe_loss` with the prompt labels summed instead of averaged, and `drift`, the distance from `old`'s states."""
    x, sigma = _noise_uniformly(batch, device)
    seed = int(torch.randint(1 << 31, ()))
    drawn = [dict(device="cpu", generator=torch.Generator().manual_seed(seed)) for _ in range(2)]  # the same guidance
    with torch.no_grad():
        before = first_states(old, batch, x, sigma, **drawn[0])
    after = first_states(pipe, batch, x, sigma, **drawn[1])
    losses = probes.early(x.shape[1], batch.labels)
    drift = [(a.float() - b).square().mean() / b.float().var() for a, b in zip(after, before, strict=True)]
    return losses | {"prompt": len(PROMPT_CLASSES) * losses["prompt"], "drift": DISTIL_WEIGHT * sum(drift)}


def full_probe_loss(pipe: Any, probes: Probes, batch: Batch, device: str) -> dict[str, Tensor]:
    """The losses of all probes of the whole editor, at high noise levels."""
    losses = editor_loss(pipe, batch, device, high=1.0, probes=probes)
    return {name: losses[name] for name in PROBE_WEIGHTS}


def train_probes(pipe: Any, probes: Probes, settings: Settings, log: Log) -> None:
    """Train text encoders, first blocks and probes for `settings.probe_minutes`.

    With `settings.start`, first the probes alone, then text encoders and first blocks with distillation.
    """
    if settings.probe_minutes <= 0:
        return
    device = settings.device
    editor = [pipe.transformer, *family_of(pipe).text_modules(pipe)]
    for module in (*editor, pipe.vae, probes):
        module.to(device)
    if settings.start is None:
        _learn(pipe, probes, editor, "probes", probe_loss, settings.text_rate, settings.probe_minutes, settings, log)
        return
    first = PROBE_SHARE * settings.probe_minutes
    _learn(pipe, probes, [], "probes", full_probe_loss, PROBE_RATE, first, settings, log)
    old = copy.deepcopy(pipe, {id(pipe.vae): pipe.vae})  # the frozen autoencoder is shared

    def loss(*call):
        return probe_distil_loss(*call, old)

    minutes, rate = settings.probe_minutes - first, settings.text_rate
    _learn(pipe, probes, editor, "probe_distil", loss, rate, minutes, settings, log, probe_scale=PROBE_RATE / rate)


def _learn(
    pipe: Any, probes: Probes, editor: list[nn.Module], part: str, loss: Callable[..., dict[str, Tensor]],
    rate: float, minutes: float, settings: Settings, log: Log, probe_scale: float = 1.0,
) -> None:  # fmt: skip
    """Train `editor`'s parameters that `loss` reaches, and the probes at `probe_scale` times the rate."""
    whole = [pipe.transformer, *family_of(pipe).text_modules(pipe)]
    for module in whole:
        module.train().requires_grad_(any(module is one for one in editor))
    probes.train().requires_grad_(True)
    # Later blocks get no gradient, and AdamW skips parameters without one.
    groups = parameter_groups(named for module in editor for named in module.named_parameters())
    groups.append(dict(params=list(probes.parameters()), share=probe_scale))
    clock = Clock(minutes)
    feed = batches(pipe, replace(settings, largest=min(LARGEST, settings.largest)), clock, TASKS[part])

    def losses(_step: int) -> dict[str, Tensor]:
        batch = next(feed)
        with autocast(settings.device):
            return loss(pipe, probes, batch, settings.device)

    fit(part, losses, groups, rate, clock, settings, log)
    for module in (*whole, probes):
        module.eval().requires_grad_(False)

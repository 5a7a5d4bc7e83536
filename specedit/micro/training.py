"""What both parts of the training share: budget, learning rate, optimizers, averaged weights, log."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import scenes


@dataclass
class Clock:
    """Wall-clock budget that survives a restart."""

    minutes: float
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.minutes)) if self.minutes > 0 else 1.0


@dataclass
class Settings:
    """What a run is made of; `steps` caps each part for a quick try.

    practise: kinds of edit that half of the tasks are of, the other half by the usual shares. enter: how far into the
    curriculum of sizes, from 0 to 1, one with `start` begins.
    """

    out: Path
    vae_minutes: float = 20.0
    text_minutes: float = 2.0
    minutes: float = 100.0
    steps: int | None = None
    device: str = "cpu"
    seed: int = 0
    rate: float = 1.5e-3
    text_rate: float = 1e-3
    vae_rate: float = 6e-4  # more undoes the thumbnail start
    largest: int = 512
    save_minutes: float = 4.0
    batch_scale: int = 1
    start: Path | None = None
    like: Path | None = None
    follow: bool = False
    link_minutes: float = 36.0
    ask_minutes: float = 5.0
    practise: tuple[str, ...] = ()
    enter: float = 0.5
    model: str = "kontext"


def rate_at(progress: float, step: int, warmup: int = 100, floor: float = 0.05) -> float:
    """Linear warm-up, flat, then a cosine over the last 60 % of the budget."""
    decay = max(0.0, (progress - 0.4) / 0.6)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay)))


# T5 does not scale its attention's logits: at the rate of all else they grow until every token looks at one other only,
# whatever the words, and no gradient leads back.
UNSCALED, SLOWER = ("SelfAttention.q.", "SelfAttention.k."), 0.1


def gentle(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups of an optimizer's parameters, each with its share of the rate: T5's queries and keys at `SLOWER`."""
    slow, rest = [], []
    for name, parameter in named:
        (slow if any(part in name for part in UNSCALED) else rest).append(parameter)
    return [dict(params=params, share=share) for params, share in ((rest, 1.0), (slow, SLOWER)) if params]


def optimizers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan et al. 2024), AdamW for all else: embeddings, modulation, norms, ends."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            modulation = ".norm" in name or "_mod." in name
            inner = "blocks." in name and parameter.ndim == 2 and not modulation
            (matrices if inner else rest).append((name, parameter))
    matrices = [p for _, p in matrices]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(gentle(rest), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
    return out


def descend(
    loss: torch.Tensor, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], rate: float
) -> None:
    """One step down the gradient of `loss`, whose norm is clipped to 1, at learning rate `rate`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


class Average:
    """Exponential moving average of parameters; short-sighted while young."""

    def __init__(self, modules: list[nn.Module], decay: float = 0.999):
        self.live = [p for m in modules for p in m.parameters()]
        self.kept = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (20 + self.count))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)


class Log:
    """Rows of numbers, written whole each time."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def add(self, **row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def fit(
    part: str, losses: Callable[[int], dict[str, torch.Tensor]], groups: list[dict[str, Any]], rate: float,
    clock: Clock, settings: Settings, log: Log,
) -> None:  # fmt: skip
    """Descend the sum of `losses`, by name, of every step until `clock` has run out.

    `groups`: AdamW's, each with its share of `rate`. Every 50 steps `log` gets a row of `part` with the losses' means.
    """
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    step, seen = 0, []
    while clock.progress < 1 and (settings.steps is None or step < settings.steps):
        parts = losses(step)
        descend(sum(parts.values()), parameters, [optimizer], rate * rate_at(clock.progress, step))
        step += 1
        seen.append([float(one.detach()) for one in parts.values()])
        if step % 50 == 0:
            means = dict(zip(parts, torch.tensor(seen).mean(0).tolist(), strict=True))
            log.add(part=part, step=step, seconds=round(clock.seconds, 1), **means)
            seen = []


def seeds(start: int, count: int) -> range:
    return range(scenes.TRAINING_SEED + start, scenes.TRAINING_SEED + start + count)


def write(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)

"""What all parts of the training share: settings, time budget, learning rate, optimizers, averaged weights, log."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specedit.micro import scenes


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
    """Options of a run; `training.micro.train` has one for each.

    Attributes:
        steps: at most this many steps of each part, for a quick try.
        practise: kinds of edit of half of the tasks; the other half has the usual shares.
        without_probes: flow matching alone, since a short run has no time to fit probes to a trained editor.
        enter: where in the curriculum of sizes, 0 to 1, a run with `start` begins.
        leave: where in it the run ends, `enter` to 1: less for smaller pictures throughout.
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
    vae_rate: float = 6e-4  # a higher rate undoes the thumbnail initialisation
    largest: int = 512
    save_minutes: float = 4.0
    batch_scale: float = 1
    start: Path | None = None
    like: Path | None = None
    follow: bool = False
    link_minutes: float = 36.0
    probe_minutes: float = 5.0
    practise: tuple[str, ...] = ()
    without_probes: bool = False
    enter: float = 0.5
    leave: float = 1.0
    model: str = "kontext"


WARMUP = 100  # steps
LOGGED = 50  # steps that one row of the log sums up


def rate_at(progress: float, step: int, floor: float = 0.05) -> float:
    """Linear warm-up, flat, then a cosine over the last 60 % of the budget."""
    decay = max(0.0, (progress - 0.4) / 0.6)
    return min(1.0, (step + 1) / WARMUP) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay)))


# T5 does not scale its attention logits. At the common rate they grow until every token attends to a single one,
# whatever the words, and no gradient undoes it.
UNSCALED_QK, QK_RATE_SCALE = ("SelfAttention.q.", "SelfAttention.k."), 0.1


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Optimizer groups with their share of the learning rate: `QK_RATE_SCALE` for T5's q and k, 1 for others."""
    slow, rest = [], []
    for name, parameter in named:
        (slow if any(part in name for part in UNSCALED_QK) else rest).append(parameter)
    return [dict(params=params, share=share) for params, share in ((rest, 1.0), (slow, QK_RATE_SCALE)) if params]


def optimizers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embeddings, modulation, norms and in/out layers."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            modulation = ".norm" in name or "_mod." in name
            inner = "blocks." in name and parameter.ndim == 2 and not modulation
            (matrices if inner else rest).append((name, parameter))
    matrices = [p for _, p in matrices]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(parameter_groups(rest), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
    return out


def descend(
    loss: torch.Tensor, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], rate: float
) -> None:
    """One optimizer step on `loss` at learning rate `rate`, with the gradient's norm clipped to 1."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


class Average:
    """Exponential moving average of parameters, with a shorter horizon in the first steps."""

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
    """A JSON list of rows, rewritten at each `add`."""

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
    """Minimise the sum of `losses(step)` with AdamW until `clock` runs out or `settings.steps` is reached.

    Args:
        part: name of its rows in the log: every `LOGGED` steps one with the mean of each loss.
        groups: parameter groups, each with its "share" of `rate` (default 1).
    """
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    step, history = 0, []
    while clock.progress < 1 and (settings.steps is None or step < settings.steps):
        parts = losses(step)
        descend(sum(parts.values()), parameters, [optimizer], rate * rate_at(clock.progress, step))
        step += 1
        history.append([float(one.detach()) for one in parts.values()])
        if step % LOGGED == 0:
            means = dict(zip(parts, torch.tensor(history).mean(0).tolist(), strict=True))
            log.add(part=part, step=step, seconds=round(clock.seconds, 1), **means)
            history = []


def seeds(start: int, count: int) -> range:
    """`count` training seeds from the `start`-th on; evaluation never uses them."""
    return range(scenes.TRAINING_SEED + start, scenes.TRAINING_SEED + start + count)


def write(state: dict, path: Path) -> None:
    """Save `state` so that an interrupted write leaves the old file."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)

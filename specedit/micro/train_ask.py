"""Teaches the first blocks to tell picture tokens what the prompt says, before the rest of the editor learns from it.

A question's answer is a far shorter way to those blocks than what is drawn in the end, and they are a third of the
transformer: small pictures and a few minutes do where the whole editor takes far longer.

An editor that has learned would unlearn the rest by it, since the later blocks are not there to object. Where one goes
on, the readings, which do not travel with it, learn to read it as it is.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cpu import autocast
from .family import of
from .questions import Questions
from .train_editor import ASK, Batch, batches, editor_loss, noised
from .training import Clock, Log, Settings, descend, rate_at

LARGEST = 128  # px; a prompt says the same at any size
READING_RATE = 5e-3  # of readings alone, which are linear
DEPTH = 2  # blocks that learn to read the prompt


@contextlib.contextmanager
def only_first(model: nn.Module) -> Iterator[None]:
    """Inside, only the first `DEPTH` blocks run."""
    names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(model, name)]
    whole = {name: getattr(model, name) for name in names}
    model.transformer_blocks = whole["transformer_blocks"][:DEPTH]
    if "single_transformer_blocks" in whole:
        model.single_transformer_blocks = nn.ModuleList()
    try:
        yield
    finally:
        for name, blocks in whole.items():
            setattr(model, name, blocks)


def ask_loss(pipe: Any, questions: Questions, batch: Batch, device: str) -> dict[str, Tensor]:
    """The losses of `Questions.early`, behind the first blocks, at any noise level."""
    family = of(pipe)
    sigma = torch.rand(len(batch.target), device=device)
    x, _ = noised(batch.target, sigma, device=device)
    with only_first(pipe.transformer):
        features = family.text(pipe, batch.prompts, batch.seen, device)
        family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at)
    return questions.early(x.shape[1], batch.answers)


def reading_loss(pipe: Any, questions: Questions, batch: Batch, device: str) -> dict[str, Tensor]:
    """All losses of the readings behind the whole editor, at high noise levels."""
    losses = editor_loss(pipe, batch, device, high=1.0, questions=questions)
    return {name: losses[name] for name in ASK}


def train_ask(pipe: Any, questions: Questions, settings: Settings, log: Log) -> None:
    """Train text encoders and first blocks for `settings.ask_minutes`; with `settings.start` the readings alone."""
    device, started = settings.device, settings.start is not None
    modules = [pipe.transformer, *of(pipe).text_modules(pipe), questions]
    for module in modules:
        module.to(device).train().requires_grad_(not started or module is questions)
    pipe.vae.to(device)
    asked, full = (reading_loss, READING_RATE) if started else (ask_loss, settings.text_rate)
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    # What lies behind the first blocks gets no gradient, and what has none is left as it is.
    optimizer = torch.optim.AdamW(parameters, lr=full, betas=(0.9, 0.98), weight_decay=0.0)
    clock, losses = Clock(settings.ask_minutes), []
    small = replace(settings, largest=min(LARGEST, settings.largest))
    for step, batch in enumerate(batches(pipe, small, clock, 1 << 19)):  # tasks of another stretch
        if clock.progress >= 1 or (settings.steps is not None and step >= settings.steps):
            break
        with autocast(device):
            answered = asked(pipe, questions, batch, device)
        rate = full * rate_at(clock.progress, step)
        descend(sum(answered.values()), parameters, [optimizer], rate)
        losses.append([float(loss.detach()) for loss in answered.values()])
        if (step + 1) % 50 == 0:
            means = dict(zip(answered, torch.tensor(losses).mean(0).tolist(), strict=True))
            log.add(part="ask", step=step + 1, seconds=round(clock.seconds, 1), **means)
            losses = []
    for module in modules:
        module.eval().requires_grad_(False)

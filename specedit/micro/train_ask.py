"""Teaches the first blocks to tell picture tokens what the prompt says, before the rest of the editor learns from it.

A question's answer is a far shorter way to those blocks than what is drawn in the end, and they are a third of the
transformer: small pictures and a few minutes do where the whole editor takes far longer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .family import of
from .questions import Questions
from .train_editor import Batch, batches, noised
from .train_link import only_first
from .training import Clock, Log, Settings, descend, rate_at

LARGEST = 128  # px; a prompt says the same at any size


def ask_loss(pipe: Any, questions: Questions, batch: Batch, device: str) -> dict[str, Tensor]:
    """The cross-entropies `said` and `seen` behind the first blocks, at any noise level."""
    family = of(pipe)
    sigma = torch.rand(len(batch.target), device=device)
    x, _ = noised(batch.target, sigma, device=device)
    with only_first(pipe.transformer):
        features = family.text(pipe, batch.prompts, batch.seen, device)
        family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at)
    return questions.early(x.shape[1], batch.answers)


def train_ask(pipe: Any, questions: Questions, settings: Settings, log: Log) -> None:
    """Train text encoders and first blocks for `settings.ask_minutes`."""
    device = settings.device
    modules = [pipe.transformer, *of(pipe).text_modules(pipe), questions]
    for module in modules:
        module.to(device).train().requires_grad_(True)
    pipe.vae.to(device)
    parameters = [p for m in modules for p in m.parameters()]
    # What lies behind the first blocks gets no gradient, and what has none is left as it is.
    optimizer = torch.optim.AdamW(parameters, lr=settings.text_rate, betas=(0.9, 0.98), weight_decay=0.0)
    clock, losses = Clock(settings.ask_minutes), []
    small = replace(settings, largest=min(LARGEST, settings.largest))
    for step, batch in enumerate(batches(pipe, small, clock, 1 << 19)):  # tasks of another stretch
        if clock.progress >= 1 or (settings.steps is not None and step >= settings.steps):
            break
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            answered = ask_loss(pipe, questions, batch, device)
        rate = settings.text_rate * rate_at(clock.progress, step)
        descend(sum(answered.values()), parameters, [optimizer], rate)
        losses.append([float(loss.detach()) for loss in answered.values()])
        if (step + 1) % 50 == 0:
            means = dict(zip(answered, torch.tensor(losses).mean(0).tolist(), strict=True))
            log.add(part="ask", step=step + 1, seconds=round(clock.seconds, 1), **means)
            losses = []
    for module in modules:
        module.eval().requires_grad_(False)

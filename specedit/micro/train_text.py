"""Teaches both text encoders what a prompt says before the transformer reads them: prompts cost next to nothing.

Every T5 token, and CLIP's pooled output, must tell by one linear reading each of `questions.SAID`. Pictures then only
have to be joined to words whose meaning is there.
"""

import torch
from torch import nn

from . import scenes
from .questions import SAID, cross_entropy, said
from .train_editor import text
from .training import Clock, Log, Settings, rate_at, seeds

BATCH = 96


def text_loss(pipe, heads: nn.ModuleList, batch: list[scenes.Scene], device: str) -> torch.Tensor:
    """Mean cross-entropy of the answers read off T5's tokens and off CLIP's pooled output."""
    embeds, pooled = text(pipe, [s.prompt for s in batch], device)
    answers = torch.tensor([said(s) for s in batch], device=device)
    words = cross_entropy(heads[0](embeds), answers[:, None].expand(-1, embeds.shape[1], -1), SAID)
    return words + cross_entropy(heads[1](pooled), answers, SAID)


def train_text(pipe, settings: Settings, log: Log) -> None:
    """Train the text encoders for `settings.text_minutes`."""
    device = settings.device
    modules = [pipe.text_encoder, pipe.text_encoder_2]
    widths = (pipe.text_encoder_2.config.d_model, pipe.text_encoder.config.hidden_size)
    heads = nn.ModuleList(nn.Linear(w, sum(SAID)) for w in widths).to(device)
    for module in modules:
        module.to(device).train().requires_grad_(True)
    parameters = [p for m in (*modules, heads) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.text_rate, betas=(0.9, 0.98), weight_decay=0.0)
    clock, step, losses = Clock(settings.text_minutes), 0, []
    while clock.progress < 1 and (settings.steps is None or step < settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.text_rate * rate_at(clock.progress, step)
        # Only the words are needed, so the tasks are another stretch of the training seeds than the pictures'.
        batch = [scenes.describe(s) for s in seeds((1 << 40) + step * BATCH, BATCH)]
        loss = text_loss(pipe, heads, batch, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            log.add(part="text", step=step, seconds=round(clock.seconds, 1), said=sum(losses) / len(losses))
            losses = []
    for module in modules:
        module.eval().requires_grad_(False)

"""Teaches the text encoders what a prompt says before the transformer reads them: prompts cost next to nothing.

Every T5 token, and CLIP's pooled output, must tell by one linear reading each of `questions.SAID`; so must the tokens
with which Qwen's causal model ends. Pictures then only have to be joined to words whose meaning is there.
"""

import torch
from torch import nn

from . import scenes
from .family import of
from .questions import SAID, cross_entropy, said
from .training import Clock, Log, Settings, fit, gentle, seeds

BATCH = 96


def text_loss(pipe, heads: nn.ModuleList, batch: list[scenes.Scene], device: str) -> torch.Tensor:
    """Mean cross-entropy of the answers, summed over what the family reads them off."""
    family = of(pipe)
    answers = torch.tensor([said(s) for s in batch], device=device)
    losses = []
    for head, states in zip(heads, family.readings(family.text(pipe, [s.prompt for s in batch], None, device))):
        labels = answers if states.ndim == 2 else answers[:, None].expand(-1, states.shape[1], -1)
        losses.append(cross_entropy(head(states), labels, SAID))
    return sum(losses)


def train_text(pipe, settings: Settings, log: Log) -> None:
    """Train the text encoders for `settings.text_minutes`."""
    device = settings.device
    family = of(pipe)
    modules = family.text_modules(pipe)
    heads = nn.ModuleList(nn.Linear(w, sum(SAID)) for w in family.widths(pipe)).to(device)
    for module in modules:
        module.to(device).train().requires_grad_(True)
    groups = gentle(named for module in modules for named in module.named_parameters())
    groups.append(dict(params=list(heads.parameters())))

    def losses(step: int) -> dict[str, torch.Tensor]:
        # Only the words are needed, so the tasks are another stretch of the training seeds than the pictures'.
        batch = [scenes.describe(s) for s in seeds((1 << 40) + step * BATCH, BATCH)]
        return dict(said=text_loss(pipe, heads, batch, device))

    fit("text", losses, groups, settings.text_rate, Clock(settings.text_minutes), settings, log)
    for module in modules:
        module.eval().requires_grad_(False)

"""Trains the text encoders alone, by linear probes of the prompt's labels. Prompts cost next to nothing to make.

Every T5 token and CLIP's pooled prompt, or the tokens that end Qwen's prompt, must make each label of
`probes.PROMPT_CLASSES` linearly readable. The transformer then starts from words whose meaning is there.
"""

import torch
from torch import nn

from specedit.micro import scenes

from .families import family_of
from .loop import Clock, Log, Settings, fit, parameter_groups, seeds
from .probes import PROMPT_CLASSES, cross_entropy, prompt_labels

BATCH = 96


def text_loss(pipe, heads: nn.ModuleList, batch: list[scenes.Scene], device: str) -> torch.Tensor:
    """Mean cross-entropy of the prompt labels, summed over the family's `probe_inputs`."""
    family = family_of(pipe)
    classes = torch.tensor([prompt_labels(s) for s in batch], device=device)
    features = family.text(pipe, [s.prompt for s in batch], None, device)
    losses = []
    for head, states in zip(heads, family.probe_inputs(features)):
        labels = classes if states.ndim == 2 else classes[:, None].expand(-1, states.shape[1], -1)
        losses.append(cross_entropy(head(states), labels, PROMPT_CLASSES))
    return sum(losses)


def train_text(pipe, settings: Settings, log: Log) -> None:
    """Train the text encoders for `settings.text_minutes`."""
    device = settings.device
    family = family_of(pipe)
    modules = family.text_modules(pipe)
    heads = nn.ModuleList(nn.Linear(w, sum(PROMPT_CLASSES)) for w in family.probe_widths(pipe)).to(device)
    for module in modules:
        module.to(device).train().requires_grad_(True)
    groups = parameter_groups(named for module in modules for named in module.named_parameters())
    groups.append(dict(params=list(heads.parameters())))

    def losses(step: int) -> dict[str, torch.Tensor]:
        # Other training seeds than the images'.
        batch = [scenes.describe(s) for s in seeds((1 << 40) + step * BATCH, BATCH)]
        return dict(prompt=text_loss(pipe, heads, batch, device))

    fit("text", losses, groups, settings.text_rate, Clock(settings.text_minutes), settings, log)
    for module in modules:
        module.eval().requires_grad_(False)

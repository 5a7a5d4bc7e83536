"""Teaches a Qwen editor that took over a Kontext editor's blocks to say to them what that editor's text encoders said.

The picture's side of the first blocks is kept; text encoder and the words' side of those blocks learn to give the
picture tokens what the other editor's words gave them. Two blocks of both run on the same latents, at the same noise:
the loss is the squared distance of the picture tokens' states behind them. It costs a third of a training step and
leads straight to where the blocks that follow can read it. The log has it in units of what another prompt would make.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import family_kontext
from .family import of
from .inherit import GUIDANCE
from .train_editor import HIGH_SHARE, Batch, batches, noise_levels, noised
from .training import Clock, Log, Settings, descend, rate_at

DEPTH = 2  # double-stream blocks of FLUX, which have weights of their own for words


@contextlib.contextmanager
def only_first(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, only the first `DEPTH` blocks run; the list holds the picture tokens' states behind them."""
    names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(model, name)]
    whole = {name: getattr(model, name) for name in names}
    states: list[Tensor] = []
    model.transformer_blocks = whole["transformer_blocks"][:DEPTH]
    if "single_transformer_blocks" in whole:
        model.single_transformer_blocks = nn.ModuleList()
    hook = model.transformer_blocks[-1].register_forward_hook(lambda _block, _inputs, out: states.append(out[1]))
    try:
        yield states
    finally:
        hook.remove()
        for name, blocks in whole.items():
            setattr(model, name, blocks)


def words_side(pipe: Any) -> list[nn.Module]:
    """What learns: the text encoder, and what only words pass through in the first blocks."""
    model = pipe.transformer
    out = [pipe.text_encoder, model.txt_norm, model.txt_in]
    for block in model.transformer_blocks[:DEPTH]:
        attn = block.attn
        out += [block.txt_mod, block.txt_mlp, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out]
        out += [attn.norm_added_q, attn.norm_added_k]
    return out


def link_loss(pipe: Any, teacher: Any, batch: Batch, device: str, high: float = HIGH_SHARE[0]) -> tuple[Tensor, Tensor]:
    """Mean squared distance of the picture tokens' states from the teacher's, and from its own under other prompts."""
    family, n = of(pipe), len(batch.target)
    sigma = noise_levels(n, math.prod(batch.grid), high, pipe.scheduler.config, device=device)
    x, _ = noised(batch.target, sigma, device=device)
    call = (x, batch.source, batch.grid, sigma)
    with torch.no_grad(), only_first(teacher.transformer) as wanted:
        embeds, pooled = family_kontext.text(teacher, batch.prompts, None, device)
        pooled = pooled.mean(0, keepdim=True).expand(n, -1)  # a Qwen transformer has a constant in its place
        for words in (embeds, embeds.roll(1, 0)):
            family_kontext.velocity_at(teacher, *call, (words, pooled), torch.full_like(sigma, GUIDANCE), batch.at)
    with only_first(pipe.transformer) as got:
        family.velocity(pipe, *call, family.text(pipe, batch.prompts, batch.seen, device), batch.at)
    true, other = (state.float() for state in wanted)
    return (got[0].float() - true).square().mean(), (other - true).square().mean()


def train_link(pipe: Any, teacher: Any, settings: Settings, log: Log) -> None:
    """Train for `settings.link_minutes`.

    Raises:
        ValueError: the teacher does the same whatever the prompt says.
    """
    device = settings.device
    teacher.to(device)
    for part in (teacher.transformer, teacher.text_encoder, teacher.text_encoder_2, pipe.transformer):
        part.requires_grad_(False)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.to(device).train()
    modules = words_side(pipe)
    for module in modules:
        module.requires_grad_(True)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.text_rate, betas=(0.9, 0.98), weight_decay=0.0)
    clock, losses, units = Clock(settings.link_minutes), [], []
    for step, batch in enumerate(batches(pipe, settings, clock, 1 << 20)):  # tasks of another stretch
        if clock.progress >= 1 or (settings.steps is not None and step >= settings.steps):
            break
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss, unit = link_loss(pipe, teacher, batch, device)
        if not units and not unit > 0:
            raise ValueError("--like: expected a trained editor, got one that does the same whatever the prompt says")
        descend(loss, parameters, [optimizer], settings.text_rate * rate_at(clock.progress, step))
        losses.append(float(loss.detach()))
        units.append(float(unit))
        if (step + 1) % 50 == 0:
            distance = sum(losses[-50:]) / sum(units[-50:])
            log.add(part="link", step=step + 1, seconds=round(clock.seconds, 1), distance=distance)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)

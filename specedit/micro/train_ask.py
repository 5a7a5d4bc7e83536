"""Teaches the first blocks to tell picture tokens what the prompt says, before the rest of the editor learns from it.

A question's answer is a far shorter way to those blocks than what is drawn in the end, and they are a third of the
transformer: small pictures and a few minutes do where the whole editor takes far longer.

An editor that has learned would unlearn the rest by it, since the later blocks are not there to object. Where one goes
on, the readings, which do not travel with it, first learn to read it as it is; then its first blocks learn to say what
they do not say yet, while what the later ones read stays near what it was.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cpu import autocast
from .family import of
from .questions import SAID, Questions
from .train_editor import ASK, Batch, batches, editor_loss, noised
from .training import Clock, Log, Settings, fit, gentle

LARGEST = 128  # px; a prompt says the same at any size
READING_RATE = 5e-3  # of readings alone, which are linear
READING_SHARE = 0.2  # of the time, where an editor goes on
DEPTH = 2  # blocks that learn to read the prompt
NEAR = 0.5  # weight of how far the first blocks' words and picture go, in shares of their variance
TASKS = {"ask": 1 << 19, "heed": 3 << 18}  # where the stretches of tasks begin, which nothing else sees


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


def first_states(pipe: Any, batch: Batch, x: Tensor, sigma: Tensor, **draw) -> tuple[Tensor, Tensor]:
    """What the first blocks make of words and of pictures: (B, L, C) and (B, N, C)."""
    family, out = of(pipe), []
    hook = pipe.transformer.transformer_blocks[DEPTH - 1].register_forward_hook(lambda *call: out.append(call[-1]))
    try:
        with only_first(pipe.transformer):
            features = family.text(pipe, batch.prompts, batch.seen, x.device)
            family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at, **draw)
    finally:
        hook.remove()
    return out[0]


def _anyhow(batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """The batch's targets at noise levels drawn uniformly (B, N, C), and these (B,)."""
    sigma = torch.rand(len(batch.target), device=device)
    return noised(batch.target, sigma, device=device)[0], sigma


def ask_loss(pipe: Any, questions: Questions, batch: Batch, device: str) -> dict[str, Tensor]:
    """The losses of `Questions.early`, behind the first blocks, at any noise level."""
    x, sigma = _anyhow(batch, device)
    first_states(pipe, batch, x, sigma)
    return questions.early(x.shape[1], batch.answers)


def heed_loss(pipe: Any, questions: Questions, batch: Batch, device: str, old: Any) -> dict[str, Tensor]:
    """Those of `ask_loss`, each answer of what is said counting whole, and how far the states went from `old`'s."""
    x, sigma = _anyhow(batch, device)
    seed = int(torch.randint(1 << 31, ()))
    drawn = [dict(device="cpu", generator=torch.Generator().manual_seed(seed)) for _ in range(2)]  # the same twice
    with torch.no_grad():
        before = first_states(old, batch, x, sigma, **drawn[0])
    after = first_states(pipe, batch, x, sigma, **drawn[1])
    losses = questions.early(x.shape[1], batch.answers)
    moved = [(a.float() - b).square().mean() / b.float().var() for a, b in zip(after, before, strict=True)]
    return losses | {"said": len(SAID) * losses["said"], "moved": NEAR * sum(moved)}


def reading_loss(pipe: Any, questions: Questions, batch: Batch, device: str) -> dict[str, Tensor]:
    """All losses of the readings behind the whole editor, at high noise levels."""
    losses = editor_loss(pipe, batch, device, high=1.0, questions=questions)
    return {name: losses[name] for name in ASK}


def train_ask(pipe: Any, questions: Questions, settings: Settings, log: Log) -> None:
    """For `settings.ask_minutes`, train text encoders and first blocks; with `settings.start` the readings alone, then
    what the first blocks do not say yet."""
    if settings.ask_minutes <= 0:
        return
    device = settings.device
    editor = [pipe.transformer, *of(pipe).text_modules(pipe)]
    for module in (*editor, pipe.vae, questions):
        module.to(device)
    if settings.start is None:
        _learn(pipe, questions, editor, "ask", ask_loss, settings.text_rate, settings.ask_minutes, settings, log)
        return
    reading = READING_SHARE * settings.ask_minutes
    _learn(pipe, questions, [], "ask", reading_loss, READING_RATE, reading, settings, log)
    old = copy.deepcopy(pipe, {id(pipe.vae): pipe.vae})  # the autoencoder does not learn, so one does

    def heed(*call):
        return heed_loss(*call, old)

    minutes, rate = settings.ask_minutes - reading, settings.text_rate
    _learn(pipe, questions, editor, "heed", heed, rate, minutes, settings, log, louder=READING_RATE / rate)


def _learn(
    pipe: Any, questions: Questions, editor: list[nn.Module], part: str, loss: Callable[..., dict[str, Tensor]],
    rate: float, minutes: float, settings: Settings, log: Log, louder: float = 1.0,
) -> None:  # fmt: skip
    """Train the readings, at `louder` times the rate, and of `editor` what `loss` reaches."""
    whole = [pipe.transformer, *of(pipe).text_modules(pipe)]
    for module in whole:
        module.train().requires_grad_(any(module is one for one in editor))
    questions.train().requires_grad_(True)
    # What lies behind the first blocks gets no gradient, and what has none is left as it is.
    groups = gentle(named for module in editor for named in module.named_parameters())
    groups.append(dict(params=list(questions.parameters()), share=louder))
    clock = Clock(minutes)
    feed = batches(pipe, replace(settings, largest=min(LARGEST, settings.largest)), clock, TASKS[part])

    def losses(_step: int) -> dict[str, Tensor]:
        batch = next(feed)
        with autocast(settings.device):
            return loss(pipe, questions, batch, settings.device)

    fit(part, losses, groups, rate, clock, settings, log)
    for module in (*whole, questions):
        module.eval().requires_grad_(False)

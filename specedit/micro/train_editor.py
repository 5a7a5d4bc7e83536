"""Trains text encoders and transformer together: rectified flow on the latents, at several sizes at once."""

import math
import random
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from einops import rearrange
from torch import Tensor, nn

from . import scenes
from .cpu import autocast
from .family import Family, of
from .questions import Answers, Questions
from .training import Average, Clock, Log, Settings, descend, optimizers, rate_at, write
from .training import seeds as training_seeds

# What a step sees at each size: (height, width) in pixels and how many scenes, about the same cost each.
BATCHES: dict[tuple[int, int], int] = {
    (64, 64): 64, (128, 128): 32, (96, 160): 32, (160, 96): 32, (256, 256): 8, (192, 192): 14,
    (192, 320): 8, (320, 192): 8, (512, 512): 2, (384, 384): 4, (384, 512): 2, (512, 384): 2,
}  # fmt: skip
# Share of steps spent at each longer side, at the start, the middle and the end of training; whoever goes on from an
# editor that has learned starts later (Settings.enter), lest it forgets the larger sizes.
CURRICULUM = (
    {64: 0.15, 128: 0.85, 256: 0.0, 512: 0.0},
    {64: 0.05, 128: 0.5, 256: 0.3, 512: 0.15},
    {64: 0.02, 128: 0.1, 256: 0.28, 512: 0.6},
)
REUSE = 3  # each encoded batch is seen about this often, with fresh noise, since rendering and encoding cost too
# Share of each kind among the tasks: what has to be drawn anew takes longest to learn.
SHARES = {"add": 0.20, "shape": 0.32, "background": 0.24, "recolor": 0.10, "remove": 0.10, "greyscale": 0.04}
# Of the steps at 512 px this share is focused: more tasks, edited in one place, on this share of the tokens only.
FOCUSED, FOCUS = 0.75, 0.25
EDIT_WEIGHT = 2.0
# Above this noise level the target can hardly be seen, so what the model draws comes from the instruction alone.
HIGH = 0.85
HIGH_SHARE = (0.7, 0.4)  # of the samples that are drawn from there, at the start and at the end of training
# Weights of the questions beside the flow loss.
ASK = {"where": 0.4, "said": 0.4, "seen": 0.1, "shown": 0.2, "find": 0.2, "aim": 0.2, "cover": 0.4}


@dataclass
class Batch:
    """Encoded tasks of one size: packed latents (B, N, 64) of source and target, prompts, and what is known of both.

    `seen`: what the text encoder sees of the sources, where it does. `at`: which of the grid's tokens (n,) these are,
    None for all. `focused`: whether the tasks' edits share a place, so that steps see the tokens around it only.
    """

    grid: tuple[int, int]
    source: Tensor
    target: Tensor
    prompts: list[str]
    answers: Answers
    seen: Any = None
    at: Tensor | None = None
    focused: bool = False

    @property
    def edited(self) -> Tensor:
        """1 (B, N) for the tokens that the edit touches."""
        return self.answers.edited

    def part(self, at: Tensor) -> "Batch":
        """The same tasks on the tokens `at` (n,) of target and reference only."""
        return replace(self, source=self.source[:, at], target=self.target[:, at], answers=self.answers.part(at), at=at)


def pack(latents: Tensor) -> Tensor:
    """diffusers' packing: (B, C, H, W) to (B, H/2 * W/2, C * 4), channel slowest."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


@torch.no_grad()
def encode(pipe: Any, tasks: list[scenes.Scene], size: tuple[int, int], device: str) -> Batch:
    """Draw `tasks` at `size` (height, width) px and encode them as the pipeline would."""
    family = of(pipe)
    before, after, mask = scenes.draw(tasks, *size, device=device)
    images = torch.cat([before, after]) * 2 - 1
    with autocast(device):
        latents = pack(family.latents(pipe.vae, images))
    edited = F.max_pool2d(mask.float()[:, None], 16).flatten(1)
    source, target = latents.chunk(2)
    grid = (size[0] // 16, size[1] // 16)
    prompts, seen = [s.prompt for s in tasks], family.look(pipe, before)
    return Batch(grid, source, target, prompts, Answers(tasks, grid, edited), seen)


def shares(practise: Collection[str] = ()) -> dict[str, float]:
    """Share of each kind of task: `SHARES`, or one half by these and one half the kinds in `practise` alone.

    Raises:
        ValueError: there is no such kind.
    """
    alone = {kind: share for kind, share in SHARES.items() if kind in set(practise)}
    if unknown := sorted(set(practise) - set(SHARES)):
        raise ValueError(f"--practise: expected some of {', '.join(SHARES)}, got {', '.join(unknown)}")
    if not alone:
        return SHARES
    whole = sum(alone.values())
    return {kind: (share + alone.get(kind, 0.0) / whole) / 2 for kind, share in SHARES.items()}


def draw_tasks(
    seeds: Iterator[int],
    count: int,
    rng: random.Random,
    place: tuple[int, int] | None = None,
    practise: Collection[str] = (),
) -> list[scenes.Scene]:
    """`count` tasks, their kinds by `shares(practise)`. With `place`, a cell of the board, the edits of one object are
    there."""
    out, share = [], shares(practise)
    for kind in rng.choices(list(share), list(share.values()), k=count):
        scene = scenes.describe(next(seeds), kind)
        while place is not None and scene.place not in (None, place):
            scene = scenes.describe(next(seeds), kind)
        out.append(scene)
    return out


def focus(edited: Tensor, grid: tuple[int, int]) -> Tensor:
    """Indices (n,) int64, ascending, of a share `FOCUS` of the tokens: around the small edits, the others by chance.

    `edited` (B, N): edits of more than half of a picture have no place and are not looked at. A step on these tokens
    of target and reference alone costs that share of a whole one, and the tokens keep their positions.
    """
    local = edited[edited.mean(1) <= 0.5]
    touched = local.amax(0) if len(local) else edited.new_zeros(edited.shape[1])
    near = F.max_pool2d(touched.view(1, 1, *grid), 3, stride=1, padding=1).flatten()
    order = near + 0.5 * torch.rand_like(near)
    return order.topk(math.ceil(FOCUS * len(order))).indices.sort().values


def batches(pipe: Any, settings: Settings, clock: Clock, start: int) -> Iterator[Batch]:
    """Tasks without end, sizes by the curriculum, each batch coming back about REUSE times, a focused one each time on
    other tokens."""
    rng = random.Random(settings.seed + start)
    pools: dict[int, list[Batch]] = {}
    # Another seed sees other tasks, and so does a resumed run: it starts further on than any step so far.
    seeds = iter(training_seeds((settings.seed << 36) + (start * settings.batch_scale << 12), 1 << 36))
    while True:
        entered = 0.0 if settings.start is None else settings.enter
        progress = entered + (1 - entered) * clock.progress
        weights = {side: share for side, share in mixture(progress).items() if side <= settings.largest}
        side = rng.choices(list(weights), list(weights.values()))[0]
        pool = pools.setdefault(side, [])
        if len(pool) < 8 or rng.random() < 1 / REUSE:
            square = (side, side)
            size = square if rng.random() < 0.7 else rng.choice(sizes(side))
            place = (rng.randrange(3), rng.randrange(3)) if max(size) == 512 and rng.random() < FOCUSED else None
            count = int(BATCHES[size] / (1 if place is None else FOCUS)) * settings.batch_scale
            batch = encode(pipe, draw_tasks(seeds, count, rng, place, settings.practise), size, settings.device)
            batch.focused = place is not None
            pool.append(batch)
            if len(pool) > 24:
                pool.pop(0)
        else:
            batch = rng.choice(pool)
        yield batch.part(focus(batch.edited, batch.grid)) if batch.focused else batch


def sizes(side: int) -> list[tuple[int, int]]:
    """The sizes of `BATCHES` with about the pixels of `side` x `side`."""
    return [size for size in BATCHES if side / 2 < math.sqrt(math.prod(size)) <= side]


def mixture(progress: float) -> dict[int, float]:
    """Share of steps at each size, interpolated through the curriculum."""
    place = progress * (len(CURRICULUM) - 1)
    i = min(int(place), len(CURRICULUM) - 2)
    low, high, f = CURRICULUM[i], CURRICULUM[i + 1], place - i
    return {side: (1 - f) * low[side] + f * high[side] for side in low}


def noise_levels(count: int, tokens: int, high: float, config, **draw) -> Tensor:
    """Noise levels (count,): a share `high` of them uniform above `HIGH`, the others shifted as the scheduler's are."""
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    normal, uniform = torch.sigmoid(torch.randn(count, **draw)), torch.rand(count, **draw)
    plain = torch.where(torch.rand(count, **draw) < 0.3, uniform, normal).clamp(1e-3, 1 - 1e-3)
    shifted = math.exp(mu) / (math.exp(mu) + 1 / plain - 1)
    top = HIGH + (1 - HIGH) * torch.rand(count, **draw)
    return torch.where(torch.rand(count, **draw) < high, top, shifted)


def noised(target: Tensor, sigma: Tensor, **draw) -> tuple[Tensor, Tensor]:
    """x = (1 - s) x0 + s e for target latents x0 (B, N, C) and noise levels s (B,); and the noise e."""
    noise = torch.randn(target.shape, **draw)
    s = sigma.view(-1, 1, 1)
    return (1 - s) * target + s * noise, noise


def token_weights(edited: Tensor) -> Tensor:
    """How much each token counts, (B, N): 1, and 1 + EDIT_WEIGHT / sqrt(share) where edited, share being its picture's.

    Edits of a few tokens are most of the tasks; by area alone they would hardly count beside a new background.
    """
    share = edited.mean(1, keepdim=True).clamp_min(1 / edited.shape[1])
    return 1 + EDIT_WEIGHT * edited / share.sqrt()


def editor_loss(
    pipe,
    batch: Batch,
    device: str,
    generator: torch.Generator | None = None,
    high: float = HIGH_SHARE[1],
    questions: Questions | None = None,
) -> dict[str, Tensor]:
    """Rectified flow, `flow`: x = (1 - s) x0 + s e, the model predicts e - x0; edited tokens count more, and more
    so where they are few.

    Where the family is guided, a share of the prompts is left empty. With `questions` their losses too. `total` is
    what to train on.
    """
    n, tokens, _ = batch.target.shape
    family, draw = of(pipe), dict(device=device, generator=generator)
    sigma = noise_levels(n, math.prod(batch.grid), high, pipe.scheduler.config, **draw)
    x, noise = noised(batch.target, sigma, **draw)
    prompts, told = left_empty(batch.prompts, family, **draw)
    features = family.text(pipe, prompts, batch.seen, device)
    out = family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at, **draw)
    error = ((out.float() - (noise - batch.target)) ** 2).mean(-1)
    weight = token_weights(batch.edited)
    flow = (error * weight).sum() / weight.sum()
    losses = {"flow": flow}
    if questions is not None:
        losses |= questions.losses(tokens, batch.answers, (sigma > HIGH).float(), weight, told)
    return losses | {"total": flow + sum(ASK[name] * loss for name, loss in losses.items() if name in ASK)}


def left_empty(prompts: list[str], family: Family, **draw) -> tuple[list[str], Tensor | None]:
    """The prompts, of a guided family some of them empty but never all, and which are not: (B,) bool, None for all."""
    if not family.empty:
        return prompts, None
    told = torch.rand(len(prompts), **draw) >= family.empty
    if not told.any():
        told[0] = True
    return [prompt if kept else " " for prompt, kept in zip(prompts, told.tolist(), strict=True)], told


def train_editor(pipe, questions: Questions, settings: Settings, log: Log) -> None:
    """Train for `settings.minutes`, from where the last run stopped."""
    device = settings.device

    def loss(batch: Batch, progress: float) -> dict[str, Tensor]:
        high = HIGH_SHARE[0] + (HIGH_SHARE[1] - HIGH_SHARE[0]) * progress
        return editor_loss(pipe, batch, device, high=high, questions=questions)

    learn(pipe, [questions], settings, log, "editor", settings.minutes, loss)


def learn(
    pipe: Any,
    more: list[nn.Module],
    settings: Settings,
    log: Log,
    part: str,
    minutes: float,
    loss: Callable[[Batch, float], dict[str, Tensor]],
    start: int = 0,
) -> None:
    """Train transformer, text encoders and `more` for `minutes`; `part`.pt holds how far it got, averaged weights stay.

    `loss`: of a batch and the share of time that is spent, by name, "total" being what is descended. `start`: where
    its stretch of tasks begins.
    """
    device, path, family = settings.device, settings.out / f"{part}.pt", of(pipe)
    modules = [pipe.transformer, *family.text_modules(pipe), *more]
    for module in modules:
        module.to(device).train().requires_grad_(True)
    pipe.vae.to(device)
    parameters = [p for m in modules for p in m.parameters()]
    optims = optimizers(modules, settings.rate)
    average = Average(modules)
    step, clock = 0, Clock(minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, old in zip(optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        average.kept, average.count = state["average"], state["count"]
        step, clock.spent = state["step"], state["seconds"]

    def save() -> None:
        write(
            dict(modules=[m.state_dict() for m in modules], optimizers=[o.state_dict() for o in optims],
                 average=average.kept, count=average.count, step=step, seconds=clock.seconds), path)  # fmt: skip
        average.swap()
        family.save(pipe, settings.out / "editor")
        average.swap()

    saved, losses = time.monotonic(), {}
    for batch in batches(pipe, settings, clock, start + step):
        if clock.progress >= 1 or (settings.steps is not None and step >= settings.steps):
            break
        with autocast(device):
            parts = loss(batch, clock.progress)
        descend(parts["total"], parameters, optims, settings.rate * rate_at(clock.progress, step))
        average.update()
        step += 1
        side = max(batch.grid) * 16
        for name, one in parts.items():
            losses.setdefault(f"{name}_{side}", []).append(float(one.detach()))
        if step % 50 == 0:
            means = {name: sum(v) / len(v) for name, v in sorted(losses.items())}
            rate = optims[0].param_groups[0]["lr"]
            log.add(part=part, step=step, seconds=round(clock.seconds, 1), rate=rate, **means)
            losses = {}
        if time.monotonic() - saved > 60 * settings.save_minutes:
            save()
            saved = time.monotonic()
    save()
    average.swap()
    for module in modules:
        module.eval().requires_grad_(False)

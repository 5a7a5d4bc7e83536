"""Trains text encoders and transformer together by flow matching on the latents, at several sizes."""

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

from specedit.micro import scenes

from .cpu import autocast
from .families import family_of
from .family import Family
from .loop import LOGGED, Average, Clock, Log, Settings, descend, optimizers, rate_at, write
from .loop import seeds as training_seeds
from .probes import Labels, Probes

# Batch size for each (height, width) in pixels; every step costs about the same.
BATCHES: dict[tuple[int, int], int] = {
    (64, 64): 64, (128, 128): 32, (96, 160): 32, (160, 96): 32, (256, 256): 8, (192, 192): 14,
    (192, 320): 8, (320, 192): 8, (512, 512): 2, (384, 384): 4, (384, 512): 2, (512, 384): 2,
}  # fmt: skip
# Share of steps at each longer side, at the start, the middle and the end of training. Training that continues from a
# trained editor enters later (Settings.enter), so that the larger sizes are not forgotten.
CURRICULUM = (
    {64: 0.15, 128: 0.85, 256: 0.0, 512: 0.0},
    {64: 0.05, 128: 0.5, 256: 0.3, 512: 0.15},
    {64: 0.02, 128: 0.1, 256: 0.28, 512: 0.6},
)
REUSE = 3  # average uses of an encoded batch, each with fresh noise, since rendering and encoding are not free
# Share of each kind of task: what has to be drawn anew takes longest to learn.
SHARES = {
    "add": 0.16, "shape": 0.26, "background": 0.19, "recolor": 0.08, "remove": 0.08, "greyscale": 0.03, "texture": 0.20,
}  # fmt: skip
# Share of focused steps at 512 px: more tasks, edited in one place, on the share FOCUS of the tokens.
FOCUSED, FOCUS = 0.75, 0.25
EDIT_WEIGHT = 2.0
# Above this noise level the target is hardly visible, so that the prediction depends on the instruction.
HIGH = 0.85
HIGH_SHARE = (0.7, 0.4)  # share of samples above it, at the start and at the end of training
TEXTURE_HIGH = 0.15  # for textures, which are drawn at every noise level, not only where the instruction says what
PROBE_WEIGHTS = {  # of the probes' losses, relative to the flow-matching loss
    "position": 0.4, "prompt": 0.4, "token": 0.1, "reference_offset": 0.2, "edited": 0.2, "edit_offset": 0.2,
    "coverage": 0.4,
}  # fmt: skip


@dataclass
class Batch:
    """Encoded tasks of one size.

    Attributes:
        grid: height and width in tokens.
        source, target: packed latents (B, N, 64).
        labels: the probes' targets.
        vision: the text encoder's image input, None where it has none.
        at: indices (n,) of these tokens in the grid, None for all.
        focused: whether all edits are in one place, so that steps use the tokens around it only.
    """

    grid: tuple[int, int]
    source: Tensor
    target: Tensor
    prompts: list[str]
    labels: Labels
    vision: Any = None
    at: Tensor | None = None
    focused: bool = False

    @property
    def edited(self) -> Tensor:
        """(B, N), 1 where the edit changes a token."""
        return self.labels.edited

    def select(self, at: Tensor) -> "Batch":
        """The same tasks on the tokens `at` (n,) of target and reference."""
        return replace(self, source=self.source[:, at], target=self.target[:, at], labels=self.labels.select(at), at=at)


def pack(latents: Tensor) -> Tensor:
    """Pack as diffusers does: (B, C, H, W) to (B, H/2 * W/2, C * 4), channel slowest."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


@torch.no_grad()
def encode(pipe: Any, tasks: list[scenes.Scene], size: tuple[int, int], device: str) -> Batch:
    """Render `tasks` at `size` (height, width) px and encode them as the pipeline does."""
    family = family_of(pipe)
    before, after, mask = scenes.draw(tasks, *size, device=device)
    images = torch.cat([before, after]) * 2 - 1
    with autocast(device):
        latents = pack(family.latents(pipe.vae, images))
    edited = F.max_pool2d(mask.float()[:, None], 16).flatten(1)
    source, target = latents.chunk(2)
    grid = (size[0] // 16, size[1] // 16)
    prompts, vision = [s.prompt for s in tasks], family.encode_image(pipe, before)
    return Batch(grid, source, target, prompts, Labels(tasks, grid, edited), vision)


def shares(practise: Collection[str] = ()) -> dict[str, float]:
    """Share of each kind of task: `SHARES`; with `practise` one half by these, the other half of those kinds alone.

    Raises:
        ValueError: an unknown kind.
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
    """`count` tasks with kinds drawn by `shares(practise)`. `place`: the board cell of every edited object."""
    out, share = [], shares(practise)
    for kind in rng.choices(list(share), list(share.values()), k=count):
        scene = scenes.describe(next(seeds), kind)
        # A part of the tokens shows no texture that continues from one to the next: no textured background there.
        allowed = (place,) if kind == "texture" else (None, place)
        while place is not None and scene.place not in allowed:
            scene = scenes.describe(next(seeds), kind)
        out.append(scene)
    return out


def focus(edited: Tensor, grid: tuple[int, int]) -> Tensor:
    """Ascending indices (n,) int64 of a share `FOCUS` of the tokens: those around small edits, then random ones.

    `edited` (B, N): edits of more than half of an image are ignored. A step on these tokens of target and reference
    costs that share of a full one, and the tokens keep their positions.
    """
    local = edited[edited.mean(1) <= 0.5]
    touched = local.amax(0) if len(local) else edited.new_zeros(edited.shape[1])
    near = F.max_pool2d(touched.view(1, 1, *grid), 3, stride=1, padding=1).flatten()
    order = near + 0.5 * torch.rand_like(near)
    return order.topk(math.ceil(FOCUS * len(order))).indices.sort().values


def batches(pipe: Any, settings: Settings, clock: Clock, start: int) -> Iterator[Batch]:
    """Endless batches, sizes by the curriculum. Each returns about REUSE times, if focused on new tokens."""
    rng = random.Random(settings.seed + start)
    pools: dict[int, list[Batch]] = {}
    # Another seed gets other tasks, and so does a resumed run: it starts after all earlier steps.
    seeds = iter(training_seeds((settings.seed << 36) + (start * math.ceil(settings.batch_scale) << 12), 1 << 36))
    while True:
        entered = 0.0 if settings.start is None else settings.enter
        progress = entered + (settings.leave - entered) * clock.progress
        weights = {side: share for side, share in mixture(progress).items() if side <= settings.largest}
        side = rng.choices(list(weights), list(weights.values()))[0]
        pool = pools.setdefault(side, [])
        if len(pool) < 8 or rng.random() < 1 / REUSE:
            square = (side, side)
            size = square if rng.random() < 0.7 else rng.choice(sizes(side))
            place = (rng.randrange(3), rng.randrange(3)) if max(size) == 512 and rng.random() < FOCUSED else None
            count = max(1, int(BATCHES[size] / (1 if place is None else FOCUS) * settings.batch_scale))
            batch = encode(pipe, draw_tasks(seeds, count, rng, place, settings.practise), size, settings.device)
            batch.focused = place is not None
            pool.append(batch)
            if len(pool) > 24:
                pool.pop(0)
        else:
            batch = rng.choice(pool)
        yield batch.select(focus(batch.edited, batch.grid)) if batch.focused else batch


def sizes(side: int) -> list[tuple[int, int]]:
    """The sizes of `BATCHES` with about as many pixels as `side` x `side`."""
    return [size for size in BATCHES if side / 2 < math.sqrt(math.prod(size)) <= side]


def mixture(progress: float) -> dict[int, float]:
    """Share of steps at each longer side, interpolated in the curriculum."""
    place = progress * (len(CURRICULUM) - 1)
    i = min(int(place), len(CURRICULUM) - 2)
    low, high, f = CURRICULUM[i], CURRICULUM[i + 1], place - i
    return {side: (1 - f) * low[side] + f * high[side] for side in low}


def noise_levels(count: int, tokens: int, high: float | Tensor, config, **draw) -> Tensor:
    """Noise levels (count,): a share `high`, one or (count,), uniform above `HIGH`, the others shifted."""
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    normal, uniform = torch.sigmoid(torch.randn(count, **draw)), torch.rand(count, **draw)
    plain = torch.where(torch.rand(count, **draw) < 0.3, uniform, normal).clamp(1e-3, 1 - 1e-3)
    shifted = math.exp(mu) / (math.exp(mu) + 1 / plain - 1)
    top = HIGH + (1 - HIGH) * torch.rand(count, **draw)
    return torch.where(torch.rand(count, **draw) < high, top, shifted)


def noised(target: Tensor, sigma: Tensor, **draw) -> tuple[Tensor, Tensor]:
    """x = (1 - s) x0 + s e for target latents x0 (B, N, C) and noise levels s (B,), and the noise e."""
    noise = torch.randn(target.shape, **draw)
    s = sigma.view(-1, 1, 1)
    return (1 - s) * target + s * noise, noise


def token_weights(edited: Tensor) -> Tensor:
    """Weight of each token (B, N): 1, or 1 + EDIT_WEIGHT / sqrt(share) if edited, share being its image's edited share.

    Most tasks edit a few tokens. By area alone they would hardly count next to a new background.
    """
    share = edited.mean(1, keepdim=True).clamp_min(1 / edited.shape[1])
    return 1 + EDIT_WEIGHT * edited / share.sqrt()


def editor_loss(
    pipe,
    batch: Batch,
    device: str,
    generator: torch.Generator | None = None,
    high: float = HIGH_SHARE[1],
    probes: Probes | None = None,
) -> dict[str, Tensor]:
    """Flow-matching loss `flow` with `token_weights`, the losses of `probes`, and `total`, the one to minimise.

    x = (1 - s) x0 + s e, and the model predicts e - x0. A family with guidance gets a share of empty prompts.
    """
    n, tokens, _ = batch.target.shape
    family, draw = family_of(pipe), dict(device=device, generator=generator)
    shares = torch.full((n,), high, device=device).masked_fill(batch.labels.textured, TEXTURE_HIGH)
    sigma = noise_levels(n, math.prod(batch.grid), shares, pipe.scheduler.config, **draw)
    x, noise = noised(batch.target, sigma, **draw)
    prompts, has_prompt = drop_prompts(batch.prompts, family, **draw)
    features = family.text(pipe, prompts, batch.vision, device)
    out = family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at, **draw)
    error = ((out.float() - (noise - batch.target)) ** 2).mean(-1)
    weight = token_weights(batch.edited)
    flow = (error * weight).sum() / weight.sum()
    losses = {"flow": flow}
    if probes is not None:
        losses |= probes.losses(tokens, batch.labels, (sigma > HIGH).float(), weight, has_prompt)
    return losses | {
        "total": flow + sum(PROBE_WEIGHTS[name] * loss for name, loss in losses.items() if name in PROBE_WEIGHTS)
    }


def drop_prompts(prompts: list[str], family: Family, **draw) -> tuple[list[str], Tensor | None]:
    """The prompts, with guidance some (never all) replaced by " "; and which are kept, (B,) bool or None for all."""
    if not family.empty_prompts:
        return prompts, None
    has_prompt = torch.rand(len(prompts), **draw) >= family.empty_prompts
    if not has_prompt.any():
        has_prompt[0] = True
    return [prompt if kept else " " for prompt, kept in zip(prompts, has_prompt.tolist(), strict=True)], has_prompt


def train_editor(pipe, probes: Probes | None, settings: Settings, log: Log) -> None:
    """Train for `settings.minutes`, without `probes` by flow matching alone; a stopped run is resumed."""
    device = settings.device

    def loss(batch: Batch, progress: float) -> dict[str, Tensor]:
        high = HIGH_SHARE[0] + (HIGH_SHARE[1] - HIGH_SHARE[0]) * progress
        return editor_loss(pipe, batch, device, high=high, probes=probes)

    learn(pipe, [] if probes is None else [probes], settings, log, "editor", settings.minutes, loss)


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
    """Train transformer, text encoders and `more` for `minutes`, and leave the averaged weights in them.

    `part`.pt holds the state that a later call resumes from.

    Args:
        loss: of a batch and the share of time spent, losses by name; "total" is minimised.
        start: its first training seed.
    """
    device, path, family = settings.device, settings.out / f"{part}.pt", family_of(pipe)
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
        if step % LOGGED == 0:
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

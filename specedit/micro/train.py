"""Trains the embedded editor from nothing: first its autoencoder, then text encoders and transformer together.

    python -m specedit.micro.train --out runs/kontext --vae-minutes 13 --minutes 80
    python -m specedit.micro.train --out runs/more --start specedit/micro/weights/kontext --minutes 8 --batch-scale 8

The second line goes on from weights that are there. The budget is wall-clock time, so the same command fits a GPU and
two cores. Run it again with the same --out to go on: a larger budget continues where the last run stopped.
`runs/kontext/editor` always holds the newest averaged weights as a pipeline directory, `runs/kontext/log.json` what
happened.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from einops import rearrange
from torch import Tensor, nn

from . import build, scenes

# What a step sees at each size: (height, width) in pixels and how many scenes, about the same cost each.
BATCHES: dict[tuple[int, int], int] = {
    (64, 64): 48, (128, 128): 32, (96, 160): 32, (160, 96): 32, (256, 256): 8, (192, 320): 8, (320, 192): 8,
    (512, 512): 2, (384, 512): 2, (512, 384): 2,
}  # fmt: skip
# Share of steps spent at each longer side, at the start, the middle and the end of training.
CURRICULUM = (
    {64: 0.3, 128: 0.6, 256: 0.1, 512: 0.0},
    {64: 0.1, 128: 0.5, 256: 0.3, 512: 0.1},
    {64: 0.1, 128: 0.2, 256: 0.4, 512: 0.3},
)
REUSE = 3  # each encoded batch is seen about this often, with fresh noise, since rendering and encoding cost too
EDIT_WEIGHT = 4.0


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
    """What a run is made of; `steps` caps each part for a quick try."""

    out: Path
    vae_minutes: float = 20.0
    minutes: float = 100.0
    steps: int | None = None
    device: str = "cpu"
    seed: int = 0
    rate: float = 1.5e-3
    vae_rate: float = 6e-4  # more undoes the thumbnail start
    largest: int = 512
    save_minutes: float = 4.0
    batch_scale: int = 1
    start: Path | None = None


def rate_at(progress: float, step: int, warmup: int = 100, floor: float = 0.05) -> float:
    """Linear warm-up, flat, then a cosine over the last 60 % of the budget."""
    decay = max(0.0, (progress - 0.4) / 0.6)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay)))


def optimizers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan et al. 2024), AdamW for all else: embeddings, modulation, norms, ends."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            inner = "blocks." in name and parameter.ndim == 2 and ".norm" not in name
            (matrices if inner else rest).append(parameter)
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
    return out


class Average:
    """Exponential moving average of parameters; short-sighted while young."""

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
    """Rows of numbers, written whole each time."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def add(self, **row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def _seeds(start: int, count: int) -> range:
    return range(scenes.TRAINING_SEED + start, scenes.TRAINING_SEED + start + count)


def _write(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


# ---------------------------------------------------------------------------------------------- autoencoder


def vae_images(step: int, count: int, side: int, device: str) -> Tensor:
    """Squares of `side` px cut from scenes drawn at several sizes, in -1..1: half before, half after the edit."""
    rng = random.Random(step)
    size = rng.choice((side, side, 2 * side, 2 * side, 4 * side))
    batch = [scenes.describe(s) for s in _seeds(step * count, count)]
    corners = [[rng.randint(0, size - side), rng.randint(0, size - side), side, side] for _ in batch]
    before, after, _ = scenes.draw(batch, size, size, torch.tensor(corners), device)
    return torch.cat([before[::2], after[1::2]]) * 2 - 1


def vae_loss(vae: nn.Module, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Reconstruction, a weak KL, and equivariance to halving the size.

    The last term (in the spirit of EQ-VAE, Kouzelis et al. 2025) asks that the mean of 2 x 2 latents be the latent of
    the halved image and decode to it: what moving tokens between resolutions relies on.
    """
    posterior = vae.encode(images).latent_dist
    latent = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=generator, device=images.device
    )
    part = len(images) // 2  # the terms about halving cost as much again: half the images are enough
    half = F.interpolate(images[:part], scale_factor=0.5, mode="area")
    pooled = F.avg_pool2d(posterior.mean[:part], 2)
    out = vae.decode(latent.to(images.dtype)).sample.float()
    small = vae.decode(pooled).sample.float()
    error = F.mse_loss(out, images)
    loss = error + 0.1 * F.l1_loss(out, images) + 0.25 * F.mse_loss(small, half)
    loss = loss + 0.01 * F.mse_loss(vae.encode(half).latent_dist.mean, pooled)
    loss = loss + 1e-4 * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return loss, float(error.detach())


def train_vae(pipe, settings: Settings, log: Log) -> None:
    vae, device = pipe.vae, settings.device
    path = settings.out / "vae.pt"
    vae.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_rate, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average([vae], 0.998)
    step, clock = 0, Clock(settings.vae_minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average.kept, average.count = state["average"], state["count"]
        step, clock.spent = state["step"], state["seconds"]

    def save() -> None:
        _write(
            dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), average=average.kept, count=average.count,
                 step=step, seconds=clock.seconds), path)  # fmt: skip

    saved, errors = time.monotonic(), []
    while clock.progress < 1 and (settings.steps is None or step < settings.steps):
        images = vae_images(step, 16, 128, device)
        for group in optimizer.param_groups:
            group["lr"] = settings.vae_rate * rate_at(clock.progress, step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss, error = vae_loss(vae, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        errors.append(error)
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / (sum(errors) / len(errors)))
            log.add(part="vae", step=step, seconds=round(clock.seconds, 1), loss=float(loss.detach()), psnr=psnr)
            errors = []
        if time.monotonic() - saved > 60 * settings.save_minutes:
            save()
            saved = time.monotonic()
    save()
    average.swap()
    vae.eval().requires_grad_(False)
    normalise(vae, device)
    log.add(part="vae", step=step, seconds=round(clock.seconds, 1), roundtrip_512=roundtrip(vae, device))


@torch.no_grad()
def normalise(vae: nn.Module, device: str) -> None:
    """Set shift and scale so that latents have mean 0 and standard deviation 1."""
    latents = [vae.encode(vae_images(10**6 + i, 16, 128, device)).latent_dist.mean for i in range(4)]
    latent = torch.cat(latents).float()
    vae.register_to_config(
        shift_factor=round(float(latent.mean()), 4), scaling_factor=round(1 / float(latent.std()), 4)
    )


@torch.no_grad()
def roundtrip(vae: nn.Module, device: str, size: int = 512, count: int = 16) -> float:
    """Mean PSNR in dB of encode then decode on unseen scenes."""
    values = []
    for seed in range(count):
        image = scenes.draw([scenes.describe(seed)], size, size, device=device)[0]
        out = vae.decode(vae.encode(image * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
        values.append(-10 * math.log10(float(F.mse_loss(out.float(), image))))
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------- text encoders, transformer


@dataclass
class Batch:
    """Encoded tasks of one size: packed latents (B, N, 64) of source and target, token weights (B, N), prompts."""

    grid: tuple[int, int]
    source: Tensor
    target: Tensor
    weight: Tensor
    prompts: list[str]


def pack(latents: Tensor) -> Tensor:
    """diffusers' packing: (B, C, H, W) to (B, H/2 * W/2, C * 4), channel slowest."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


@torch.no_grad()
def encode(vae: nn.Module, seeds: range, size: tuple[int, int], device: str) -> Batch:
    batch = [scenes.describe(s) for s in seeds]
    before, after, mask = scenes.draw(batch, *size, device=device)
    images = torch.cat([before, after]) * 2 - 1
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        latents = vae.encode(images).latent_dist.mean.float()
    latents = pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)
    edited = F.max_pool2d(mask.float()[:, None], 16).flatten(1)
    source, target = latents.chunk(2)
    return Batch((size[0] // 16, size[1] // 16), source, target, 1 + EDIT_WEIGHT * edited, [s.prompt for s in batch])


def batches(vae: nn.Module, settings: Settings, clock: Clock, start: int) -> Iterator[Batch]:
    """Tasks without end, sizes by the curriculum, each batch coming back about REUSE times."""
    rng = random.Random(settings.seed + start)
    pools: dict[int, list[Batch]] = {}
    drawn = start * 64 * settings.batch_scale  # further on than any step so far, so that a resumed run sees new tasks
    while True:
        weights = {side: share for side, share in mixture(clock.progress).items() if side <= settings.largest}
        side = rng.choices(list(weights), list(weights.values()))[0]
        pool = pools.setdefault(side, [])
        if len(pool) < 8 or rng.random() < 1 / REUSE:
            sizes = [s for s in BATCHES if side // 2 < max(s) <= side or s == (side, side)]
            square = (side, side)
            size = square if rng.random() < 0.7 else rng.choice(sizes)
            count = BATCHES[size] * settings.batch_scale
            pool.append(encode(vae, _seeds(drawn, count), size, settings.device))
            drawn += count
            if len(pool) > 24:
                pool.pop(0)
            yield pool[-1]
        else:
            yield rng.choice(pool)


def mixture(progress: float) -> dict[int, float]:
    """Share of steps at each size, interpolated through the curriculum."""
    place = progress * (len(CURRICULUM) - 1)
    i = min(int(place), len(CURRICULUM) - 2)
    low, high, f = CURRICULUM[i], CURRICULUM[i + 1], place - i
    return {side: (1 - f) * low[side] + f * high[side] for side in low}


def ids(grid: tuple[int, int], image: int, device: str) -> Tensor:
    """Position ids (N, 3) float32: image index, row, column, as FluxKontextPipeline numbers them."""
    h, w = grid
    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in (h, w))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], -1).reshape(-1, 3)


def editor_loss(
    pipe, batch: Batch, device: str, generator: torch.Generator | None = None, drop: float = 0.05
) -> Tensor:
    """Rectified flow: x = (1 - s) x0 + s e, the model predicts e - x0; edited tokens count more."""
    n, tokens, _ = batch.target.shape
    draw = dict(device=device, generator=generator)
    config = pipe.scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    normal, uniform = torch.sigmoid(torch.randn(n, **draw)), torch.rand(n, **draw)
    plain = torch.where(torch.rand(n, **draw) < 0.3, uniform, normal).clamp(1e-3, 1 - 1e-3)
    sigma = math.exp(mu) / (math.exp(mu) + 1 / plain - 1)
    noise = torch.randn(batch.target.shape, **draw)
    s = sigma.view(n, 1, 1)
    x = (1 - s) * batch.target + s * noise
    kept = torch.rand(n, **draw) >= drop
    prompts = [p if k else "" for p, k in zip(batch.prompts, kept.tolist(), strict=True)]
    embeds, pooled = text(pipe, prompts, device)
    out = pipe.transformer(
        hidden_states=torch.cat([x, batch.source], 1),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=1 + 4 * torch.rand(n, **draw),
        img_ids=torch.cat([ids(batch.grid, 0, device), ids(batch.grid, 1, device)]),
        txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
        return_dict=False,
    )[0][:, :tokens]
    error = ((out.float() - (noise - batch.target)) ** 2).mean(-1)
    return (error * batch.weight).sum() / batch.weight.sum()


def text(pipe, prompts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Prompt features as FluxKontextPipeline.encode_prompt makes them, with gradients."""
    padded = dict(padding="max_length", truncation=True, max_length=build.TEXT_TOKENS, return_tensors="pt")
    words = pipe.tokenizer_2(prompts, **padded).input_ids.to(device)
    pooled = pipe.text_encoder(pipe.tokenizer(prompts, **padded).input_ids.to(device)).pooler_output
    return pipe.text_encoder_2(words)[0], pooled


def train_editor(pipe, settings: Settings, log: Log) -> None:
    device = settings.device
    path = settings.out / "editor.pt"
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    for module in modules:
        module.to(device).train().requires_grad_(True)
    pipe.vae.to(device)
    parameters = [p for m in modules for p in m.parameters()]
    optims = optimizers(modules, settings.rate)
    average = Average(modules)
    step, clock = 0, Clock(settings.minutes)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, old in zip(optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        average.kept, average.count = state["average"], state["count"]
        step, clock.spent = state["step"], state["seconds"]

    def save() -> None:
        _write(
            dict(modules=[m.state_dict() for m in modules], optimizers=[o.state_dict() for o in optims],
                 average=average.kept, count=average.count, step=step, seconds=clock.seconds), path)  # fmt: skip
        average.swap()
        build.save(pipe, settings.out / "editor")
        average.swap()

    saved, losses = time.monotonic(), {}
    for batch in batches(pipe.vae, settings, clock, step):
        if clock.progress >= 1 or (settings.steps is not None and step >= settings.steps):
            break
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * rate_at(clock.progress, step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = editor_loss(pipe, batch, device)
        for optimizer in optims:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optims:
            optimizer.step()
        average.update()
        step += 1
        losses.setdefault(max(batch.grid) * 16, []).append(float(loss.detach()))
        if step % 50 == 0:
            means = {f"loss_{side}": sum(v) / len(v) for side, v in sorted(losses.items())}
            log.add(
                part="editor", step=step, seconds=round(clock.seconds, 1), rate=optims[0].param_groups[0]["lr"], **means
            )
            losses = {}
        if time.monotonic() - saved > 60 * settings.save_minutes:
            save()
            saved = time.monotonic()
    save()
    average.swap()
    for module in modules:
        module.eval().requires_grad_(False)


def train(settings: Settings):
    """Train, or go on training, the editor in `settings.out`; returns the pipeline with averaged weights."""
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    log = Log(settings.out / "log.json")
    if settings.start is None:
        pipe = build.kontext(settings.seed)
        train_vae(pipe, settings, log)
    else:
        pipe = build.load(settings.start, torch_dtype=torch.float32)
    train_editor(pipe, settings, log)
    build.save(pipe, settings.out / "editor")
    return pipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=Settings.vae_minutes)
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--steps", type=int, help="at most this many steps of each part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=Settings.largest, help="largest side trained at, in pixels")
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--batch-scale", type=int, default=1, help="times the tasks of a step; a GPU has room for 8")
    parser.add_argument(
        "--start",
        type=Path,
        help="directory of an editor to go on from; its autoencoder is kept, since the latents are what it learned",
    )
    train(Settings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()

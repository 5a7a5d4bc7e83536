"""Trains the autoencoder: reconstruction, a weak KL, and latents equivariant to halving the image."""

import math
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specedit.micro import scenes

from .cpu import autocast
from .families import family_of
from .family import Family
from .inherit import copy_latent_statistics
from .loop import LOGGED, Average, Clock, Log, Settings, descend, rate_at, seeds, write


def vae_images(step: int, count: int, side: int, device: str) -> Tensor:
    """Crops (count, 3, side, side) in -1..1 of scenes at several sizes, half before and half after the edit."""
    rng = random.Random(step)
    size = rng.choice((side, side, 2 * side, 2 * side, 4 * side))
    batch = [scenes.describe(s) for s in seeds(step * count, count)]
    corners = [[rng.randint(0, size - side), rng.randint(0, size - side), side, side] for _ in batch]
    before, after, _ = scenes.draw(batch, size, size, torch.tensor(corners), device)
    return torch.cat([before[::2], after[1::2]]) * 2 - 1


def vae_loss(
    vae: Any, images: Tensor, generator: torch.Generator | None = None, teacher: nn.Module | None = None
) -> tuple[Tensor, float]:
    """Loss of a family's flat autoencoder, and its reconstruction error.

    Reconstruction, a weak KL and a scale-equivariance term in the spirit of EQ-VAE (Kouzelis et al. 2025): the mean of
    2 x 2 latents should be the latent of the halved image and decode to it. Moving tokens between resolutions relies on
    that.

    With `teacher`, another autoencoder, the encoder is distilled to its latents (squared distance in units of their
    variance), and the decoder learns to decode the teacher's latents.
    """
    posterior = vae.encode(images).latent_dist
    if teacher is None:
        centre, distance = posterior.mean, 0.0
    else:
        with torch.no_grad():
            centre = teacher.encode(images).latent_dist.mean
        distance = F.mse_loss(posterior.mean, centre) / centre.var()
    latent = centre + posterior.std * torch.randn(centre.shape, generator=generator, device=images.device)
    part = len(images) // 2  # half the images, since the scale terms cost as much as the rest
    half = F.interpolate(images[:part], scale_factor=0.5, mode="area")
    pooled = F.avg_pool2d(centre[:part], 2)
    out = vae.decode(latent.to(images.dtype)).sample.float()
    small = vae.decode(pooled).sample.float()
    error = F.mse_loss(out, images)
    loss = distance + error + 0.1 * F.l1_loss(out, images) + 0.25 * F.mse_loss(small, half)
    loss = loss + 0.01 * F.mse_loss(vae.encode(half).latent_dist.mean, pooled)
    loss = loss + 1e-4 * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return loss, float(error.detach())


def train_vae(pipe, settings: Settings, log: Log, teacher: Any = None) -> None:
    """Train for `settings.vae_minutes`. `teacher`: a pipeline whose latents are distilled."""
    vae, device, family = pipe.vae, settings.device, family_of(pipe)
    flat = family.flat(vae)
    path = settings.out / "vae.pt"
    known = None if teacher is None else teacher.vae.to(device)
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
        write(
            dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), average=average.kept, count=average.count,
                 step=step, seconds=clock.seconds), path)  # fmt: skip

    saved, errors = time.monotonic(), []
    while clock.progress < 1 and (settings.steps is None or step < settings.steps):
        images = vae_images(step, 16, 128, device)
        with autocast(device):
            loss, error = vae_loss(flat, images, teacher=known)
        descend(loss, list(vae.parameters()), [optimizer], settings.vae_rate * rate_at(clock.progress, step))
        average.update()
        step += 1
        errors.append(error)
        if step % LOGGED == 0:
            psnr = 10 * math.log10(4 / (sum(errors) / len(errors)))
            log.add(part="vae", step=step, seconds=round(clock.seconds, 1), loss=float(loss.detach()), psnr=psnr)
            errors = []
        if time.monotonic() - saved > 60 * settings.save_minutes:
            save()
            saved = time.monotonic()
    save()
    average.swap()
    vae.eval().requires_grad_(False)
    if known is None:
        normalise(vae, family, device)
    else:
        copy_latent_statistics(vae, known)
    log.add(part="vae", step=step, seconds=round(clock.seconds, 1), roundtrip_512=roundtrip(flat, device))


@torch.no_grad()
def normalise(vae: nn.Module, family: Family, device: str) -> None:
    """Set the configuration so that latents have mean 0 and standard deviation 1."""
    flat = family.flat(vae)
    latents = [flat.encode(vae_images(10**6 + i, 16, 128, device)).latent_dist.mean for i in range(4)]
    family.set_statistics(vae, torch.cat(latents).float())


@torch.no_grad()
def roundtrip(vae: Any, device: str, size: int = 512, count: int = 16) -> float:
    """Mean PSNR in dB of encode then decode on unseen scenes."""
    values = []
    for seed in range(count):
        image = scenes.draw([scenes.describe(seed)], size, size, device=device)[0]
        out = vae.decode(vae.encode(image * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
        values.append(-10 * math.log10(float(F.mse_loss(out.float(), image))))
    return sum(values) / len(values)

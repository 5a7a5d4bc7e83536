"""Statistics of a texture inside a region: spectrum, gradient histograms, and quantiles of colours and of patches.

Each statistic is a vector, so that the mean over pictures is the statistic of all of them, and the distance between two
is the mean absolute difference. A texture's direction is random: spectra are averaged over angles, orientations
are relative to the dominant one, and every projection of patches is read at eight angles.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from .regions import eroded

PATCHES = (5, 13)  # px a side
FEWEST = 24  # patches of a size that a region must have room for
TAPER = 3  # px over which the spectrum's window falls to zero inside the region
BANDS = 12  # of the spectrum, equally wide in octaves
LONGEST, SHORTEST = 64.0, 2.0  # px, wavelengths of the spectrum
NOISE = 2 / 255  # standard deviation below which white noise hardly moves the spectrum
STEEPEST = 0.5  # gradient magnitude per px at the end of its histogram
BINS = 24
ORIENTATIONS = 8
PROJECTIONS, ANGLES, WAVES = 16, 8, 3
PLACES = 512  # patches of a picture, at most
QUANTILES = 48
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Statistics = dict[str, Tensor]


def describe(pictures: Tensor, region: Tensor) -> Statistics:
    """The statistics of pictures (n, 3, h, w) float32 in 0..1 inside a region (h, w) bool, by name, each (n, length).

    Patches of a size that hardly fits into the region are left out.

    Raises:
        ValueError: a region without room for 24 patches of 5 px.
    """
    if not bool(region.any()):
        raise ValueError("region: expected pixels of the texture, got none")
    rows, columns = (region.any(axis).nonzero().flatten() for axis in (1, 0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    pictures, region = pictures[..., box[0], box[1]], region[box]
    fitting = {side: centres(region, side) for side in PATCHES}
    if len(fitting[PATCHES[0]]) < FEWEST:
        raise ValueError(
            f"region: expected room for {FEWEST} patches of {PATCHES[0]} x {PATCHES[0]} px, got "
            f"{len(fitting[PATCHES[0]])} in {int(region.sum())} px"
        )
    grey = torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor(_LUMA))
    found = {"spectrum": spectrum(grey, region), **gradients(grey, region)}
    places = _spread(region.nonzero(), 4 * PLACES)
    found["colours"] = _quantiles(pictures[:, :, places[:, 0], places[:, 1]]).flatten(1)
    for side, places in fitting.items():
        if len(places) >= FEWEST:
            found[f"patches_{side}"] = projected(pictures, places, side)
    return found


def has_room(region: Tensor) -> bool:
    """Whether `describe` accepts a region (h, w) bool."""
    return len(centres(region, PATCHES[0])) >= FEWEST


def centres(region: Tensor, side: int) -> Tensor:
    """Row and column (k, 2) of every px of the region around which a patch lies within it."""
    return eroded(region, side // 2).nonzero()


def spectrum(grey: Tensor, region: Tensor) -> Tensor:
    """log10 of the power per frequency, averaged over angles; (n, bands), without bands that the region cannot hold.

    The window is one inside the region and falls to zero at its border, so that the border's shape adds little.
    """
    window = _window(region)
    mean = (grey * window).sum((1, 2), keepdim=True) / window.sum()
    power = torch.fft.rfft2((grey - mean) * window).abs().square() / window.square().sum()
    bands = _bands(*region.shape)
    return torch.log10(power.flatten(1) @ bands.to(power) + NOISE**2)


def _window(region: Tensor) -> Tensor:
    inside = torch.stack([eroded(region, by) for by in range(1, TAPER + 1)]).float().mean(0)
    return torch.sin(inside * (math.pi / 2)).square()


@functools.lru_cache(maxsize=64)
def _bands(height: int, width: int) -> Tensor:
    """(frequencies, bands) float64: the mean over each band of rfft2's frequencies; empty bands are left out."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    edges = np.geomspace(1 / LONGEST, 1 / SHORTEST, BANDS + 1)
    columns = np.minimum(np.arange(width // 2 + 1), 1) + 1.0  # a half plane: all but the first column count twice
    weight = np.broadcast_to(columns, radius.shape)
    found = [weight * ((radius >= a) & (radius < b)) for a, b in itertools.pairwise(edges)]
    return torch.from_numpy(np.stack([f.ravel() / f.sum() for f in found if f.sum() >= 4], 1))


def gradients(grey: Tensor, region: Tensor) -> Statistics:
    """Histograms of gradients: of magnitudes, cumulative; of orientations relative to the dominant one, by strength."""
    inside = eroded(region, 1)[1:-1, 1:-1]
    dy = (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1])[:, inside] / 2
    dx = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2])[:, inside] / 2
    steep = torch.hypot(dx, dy)
    edges = STEEPEST * torch.linspace(0, 1, BINS + 1)[1:-1].square()  # narrow where most gradients are
    below = torch.searchsorted(steep.sort(1).values.contiguous(), edges.expand(len(steep), -1).contiguous())
    double = 2 * torch.atan2(dy, dx)  # an orientation is a direction up to its sign
    power = steep.square()
    main = torch.atan2((power * double.sin()).sum(1), (power * double.cos()).sum(1))
    turned = torch.remainder(double - main[:, None] + math.pi / ORIENTATIONS, 2 * math.pi)
    bins = (turned * (ORIENTATIONS / (2 * math.pi))).long().clamp(max=ORIENTATIONS - 1)
    strength = torch.zeros(len(steep), ORIENTATIONS).scatter_add_(1, bins, steep)
    strength = strength / strength.sum(1, keepdim=True).clamp(min=1e-6)
    mirrored = (strength + strength.flip(1).roll(1, 1)) / 2  # left and right of the dominant orientation are alike
    return {"magnitudes": below / steep.shape[1], "orientations": mirrored[:, : ORIENTATIONS // 2 + 1]}


def projected(pictures: Tensor, places: Tensor, side: int) -> Tensor:
    """Quantiles of patches projected on fixed random filters, (n, projections * quantiles).

    The distance of two pictures is then the sliced Wasserstein distance of their patches. A filter's responses at all
    angles are one distribution, which does not change when the picture is turned. Filters ignore the patch's mean
    colour, which varies more between two right answers than their structure does; "colours" has it.
    """
    places = _spread(places, PLACES)
    offsets = torch.arange(side) - side // 2
    at_rows = (places[:, 0, None] + offsets)[:, :, None]
    at_columns = (places[:, 1, None] + offsets)[:, None, :]
    patches = pictures[:, :, at_rows, at_columns]  # (n, 3, k, side, side)
    filters = _filters(side)
    responses = torch.einsum("nckyx,cyxf->nfk", patches, filters)
    return _quantiles(responses.unflatten(1, (PROJECTIONS, ANGLES)).flatten(2)).flatten(1)


def _spread(places: Tensor, most: int) -> Tensor:
    """At most so many of the places (k, 2), evenly over their order."""
    return places[np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(int)]


def _quantiles(values: Tensor) -> Tensor:
    """(..., QUANTILES) of (..., n): the mean absolute difference of two is their Wasserstein distance."""
    ranks = (np.arange(QUANTILES) + 0.5) / QUANTILES * values.shape[-1]
    return values.sort(-1).values[..., ranks.astype(int)]


@functools.cache
def _filters(side: int) -> Tensor:
    """(3, side, side, projections * angles): sums of plane waves under a round window, each at `ANGLES` angles.

    Their means are zero.
    """
    rng = np.random.default_rng(side)
    offsets = np.arange(side) - side // 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    window = np.cos(np.minimum(np.hypot(x, y) / (side / 2 + 0.5), 1) * np.pi / 2)
    filters = []
    for _ in range(PROJECTIONS):
        colour = rng.normal(size=(WAVES, 3))
        frequency, phase = rng.uniform(0, np.pi * 0.7, WAVES), rng.uniform(0, 2 * np.pi, WAVES)
        direction = rng.uniform(0, 2 * np.pi, WAVES)
        turned = []
        for turn in 2 * np.pi * np.arange(ANGLES) / ANGLES:
            along = x[..., None] * np.cos(direction + turn) + y[..., None] * np.sin(direction + turn)
            waves = np.einsum("yxw,wc->cyx", np.cos(frequency * along + phase), colour) * window
            turned.append(waves - window * (waves.sum((1, 2), keepdims=True) / window.sum()))
        scale = np.sqrt(np.mean([np.square(t).sum() for t in turned]))
        filters += [t / scale for t in turned]
    return torch.from_numpy(np.stack(filters, -1)).float()

"""Draws scenes: signed distance functions over a pixel grid, many scenes in one call.

Coordinates are in pixels of the whole image; `window` renders a part of it at the same scale. All functions run on any
device. A scene looks the same in every batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .textures import texture
from .vocabulary import SHAPES


@dataclass(frozen=True)
class Thing:
    """One object: a shape of radius `r` (share of the shorter side) centred at (x, y) (shares of width, height).

    With a `material` of `textures.MATERIALS` it is drawn in that, from `seed`, instead of in its colour.
    """

    shape: str
    colour: str
    x: float
    y: float
    r: float
    material: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Backdrop:
    """A background: `kind`, two RGB colours in 0..1, and parameters of its kind (angle, period, photo window).

    Of kind "texture" it is drawn in `material`, one of `textures.MATERIALS`, from `seed`.
    """

    kind: str
    first: tuple[float, float, float] = (0.5, 0.5, 0.5)
    second: tuple[float, float, float] = (0.5, 0.5, 0.5)
    angle: float = 0.0
    period: float = 0.25
    photo: int = -1
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, width, height, shares of the photo
    seed: int = 0
    material: str = ""


def _polygon(sides: int, turn: float) -> Callable[[Tensor, Tensor], Tensor]:
    inner = math.cos(math.pi / sides)
    normals = [turn + 2 * math.pi * k / sides for k in range(sides)]

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x * math.cos(a) + y * math.sin(a) for a in normals]).amax(0) - inner

    return distance


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane into one tenth: a straight edge from the tip (1, 0) to the inner corner.
    wedge = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + wedge / 2, wedge) - wedge / 2
    radius = torch.hypot(x, y)
    u, v = radius * torch.cos(angle), radius * torch.sin(angle).abs()
    cx, cy = 0.45 * math.cos(wedge / 2), 0.45 * math.sin(wedge / 2)
    length = math.hypot(1 - cx, cy)
    return ((u - 1) * cy + v * (1 - cx)) / length


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


# Distance to the outline, negative inside, for a shape of radius 1 (y points down).
DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: _box(x, y, 0.85, 0.85),
    "triangle": _polygon(3, math.pi / 2),
    "diamond": lambda x, y: (x.abs() + y.abs() - 1) / math.sqrt(2),
    "star": _star,
    "hexagon": _polygon(6, math.pi / 6),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.33, 1.0), _box(x, y, 1.0, 0.33)),
}
assert set(DISTANCE) == set(SHAPES)


def coverage(
    things: Sequence[Thing], height: int, width: int, window: Tensor | None = None, device: str | torch.device = "cpu"
) -> Tensor:
    """Anti-aliased coverage of each object, (n, h, w) float32 in 0..1.

    `window` (n, 4) int: top, left, h, w of the part to draw (equal h, w for all); None: the whole image.
    """
    n = len(things)
    y0, x0, h, w = _window(window, n, height, width, device)
    side = min(height, width)
    numbers = torch.tensor(
        [[t.x * width, t.y * height, t.r * side] for t in things], dtype=torch.float32, device=device
    ).reshape(n, 3)
    cx, cy, r = (c.view(n, 1, 1) for c in numbers.unbind(1))
    out = torch.zeros(n, h, w, device=device)
    for shape in SHAPES:
        which = [i for i, t in enumerate(things) if t.shape == shape]
        if not which:
            continue
        index = torch.tensor(which, device=device)
        ys = y0[index].view(-1, 1, 1) + torch.arange(h, device=device).view(1, h, 1) + 0.5
        xs = x0[index].view(-1, 1, 1) + torch.arange(w, device=device).view(1, 1, w) + 0.5
        x, y = torch.broadcast_tensors((xs - cx[index]) / r[index], (ys - cy[index]) / r[index])
        out[index] = (0.5 - DISTANCE[shape](x, y) * r[index]).clamp(0, 1)
    return out


def backdrop(
    backdrops: Sequence[Backdrop],
    height: int,
    width: int,
    photos: Tensor,
    window: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Backgrounds, (n, 3, h, w) float32 in 0..1. `photos` (p, 3, s, s) float32 holds the photographs."""
    n = len(backdrops)
    y0, x0, h, w = _window(window, n, height, width, device)
    ys = ((y0.view(n, 1) + torch.arange(h, device=device) + 0.5) / height).view(n, h, 1).expand(n, h, w)
    xs = ((x0.view(n, 1) + torch.arange(w, device=device) + 0.5) / width).view(n, 1, w).expand(n, h, w)
    pixel = 1.0 / min(height, width)
    images = []
    for i, b in enumerate(backdrops):
        x, y = xs[i], ys[i]
        if b.kind == "texture":
            images.append(texture(b.material, b.seed, h, w, device, int(y0[i]), int(x0[i])))
            continue
        if b.kind == "photo":
            images.append(_photo(photos[b.photo].to(device), b.window, x, y, height, width))
            continue
        u = (x - 0.5) * math.cos(b.angle) + (y - 0.5) * math.sin(b.angle)
        if b.kind == "plain":
            mix = torch.zeros_like(u)
        elif b.kind == "gradient":
            mix = (u / (abs(math.cos(b.angle)) + abs(math.sin(b.angle))) + 0.5).clamp(0, 1)
        elif b.kind == "radial":
            mix = (torch.hypot(x - 0.5, y - 0.5) / 0.7072).clamp(0, 1)
        elif b.kind == "stripes":
            mix = _wave(u / b.period, pixel / b.period)
        elif b.kind == "checks":
            across, down = _wave(x / b.period, pixel / b.period), _wave(y / b.period, pixel / b.period)
            mix = across * (1 - down) + down * (1 - across)
        elif b.kind == "clouds":
            mix = _clouds(b.seed, x, y)
        else:
            raise ValueError(f"unknown background kind {b.kind!r}")
        first, second = (torch.tensor(c, dtype=torch.float32, device=device).view(3, 1, 1) for c in (b.first, b.second))
        images.append(first + (second - first) * mix)
    return torch.stack(images)


def _window(window: Tensor | None, n: int, height: int, width: int, device) -> tuple[Tensor, Tensor, int, int]:
    if window is None:
        zero = torch.zeros(n, device=device)
        return zero, zero, height, width
    return window[:, 0].to(device).float(), window[:, 1].to(device).float(), int(window[0, 2]), int(window[0, 3])


def _wave(t: Tensor, pixel: float) -> Tensor:
    """A square wave of period 2 with edges one pixel wide; `pixel` is a pixel's width in t."""
    distance = (torch.remainder(t, 2.0) - 1.0).abs() - 0.5
    return (0.5 - distance / pixel).clamp(0, 1)


def _clouds(seed: int, x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise: a 4 x 4 lattice of random numbers, interpolated bicubically."""
    lattice = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).to(x.device)
    grid = torch.stack([x * 2 - 1, y * 2 - 1], -1)[None]
    return F.grid_sample(lattice, grid, mode="bicubic", padding_mode="border", align_corners=False)[0, 0].clamp(0, 1)


def _photo(photo: Tensor, window: tuple, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    left, top, share_w, share_h = window
    side = photo.shape[-1]
    # Shrink first if several photo pixels fall on one image pixel, to avoid aliasing.
    factor = max(abs(share_w) * side / width, abs(share_h) * side / height)
    if factor > 1:
        photo = F.interpolate(photo[None], scale_factor=1 / factor, mode="bilinear", antialias=True)[0]
    grid = torch.stack([(left + x * share_w) * 2 - 1, (top + y * share_h) * 2 - 1], -1)[None]
    return F.grid_sample(photo[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def compose(background: Tensor, layers: Sequence[Tensor], colours: Sequence[Tensor]) -> Tensor:
    """Paint coverage layers (n, h, w) over backgrounds (n, 3, h, w), first layer lowest.

    `colours`: of each layer, (n, 3), or (n, 3, h, w) for a texture.
    """
    image = background
    for alpha, colour in zip(layers, colours, strict=True):
        if colour.ndim == 2:
            colour = colour[:, :, None, None]
        image = image + (colour - image) * alpha[:, None]
    return image

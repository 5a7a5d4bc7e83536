"""Procedural materials: any number of right answers to an instruction such as "fill the background with clouds".

Features are 16 to 64 px in size, one to four of the editors' tokens, in a picture of any size: a larger picture shows
more of the material, not larger features. A seed draws phase, scale and direction, and slightly changes the palette.
Every pixel is a function of its coordinates, so a window of a texture is that part of the whole.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .vocabulary import MATERIALS as MATERIALS

JITTER = 0.04  # of each channel of a palette's colours
TABLE = 64  # cells a side until a cellular material repeats

# Dark or first colour, light or second, and for strokes a third.
PALETTES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "clouds": ((0.30, 0.52, 0.82), (0.95, 0.96, 0.98)),
    "marble": ((0.90, 0.89, 0.86), (0.28, 0.29, 0.33)),
    "wood grain": ((0.76, 0.55, 0.33), (0.38, 0.22, 0.11)),
    "pebbles": ((0.48, 0.47, 0.45), (0.82, 0.77, 0.68), (0.13, 0.12, 0.11)),
    "ripples": ((0.05, 0.34, 0.40), (0.62, 0.86, 0.84)),
    "brush strokes": ((0.86, 0.36, 0.22), (0.94, 0.76, 0.33), (0.42, 0.22, 0.50)),
}
assert tuple(PALETTES) == MATERIALS


def texture(
    material: str,
    seed: int,
    height: int,
    width: int,
    device: str | torch.device = "cpu",
    top: int = 0,
    left: int = 0,
) -> Tensor:
    """Draw a material, (3, height, width) float32 in 0..1.

    `top`, `left`: the window's first row and column in the texture, in pixels.

    Raises:
        ValueError: another material than `MATERIALS`, a seed below 0, or no pixel.
    """
    if material not in PALETTES:
        raise ValueError(f"material: expected one of {', '.join(MATERIALS)}, got {material!r}")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed!r}")
    if min(height, width) < 1:
        raise ValueError(f"height, width: expected at least 1 px a side, got {height} x {width}")
    rng = np.random.default_rng([MATERIALS.index(material), int(seed)])
    colours = np.array(PALETTES[material]) + rng.uniform(-JITTER, JITTER, (len(PALETTES[material]), 3))
    palette = torch.tensor(colours, dtype=torch.float32, device=device)[..., None, None]
    y, x = (
        torch.arange(count, device=device, dtype=torch.float32) + first + 0.5
        for first, count in ((top, height), (left, width))
    )
    return _DRAW[material](rng, palette, y, x).clamp(0, 1)


def _clouds(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    size = rng.uniform(0.75, 1.0)
    cover = _field(_waves(rng, 64, 20 * size, 64 * size, slope=1.0), y, x)
    return _mix(palette, torch.sigmoid(2.5 * cover + rng.uniform(-0.5, 0.5)))


def _marble(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    period, heading = _drawn(rng, 28, 44), rng.uniform(0, 2 * math.pi)
    along, _ = _turned(heading, y, x)
    bend = _field(_waves(rng, 32, 44, 88, slope=0.5), y, x)
    shade = _field(_waves(rng, 32, 24, 64), y, x)
    vein = (1 - (math.pi * along / period + 1.1 * bend).sin().abs()) ** 2
    return _mix(palette, (0.85 * vein + 0.1 + 0.08 * shade).clamp(0, 1))


def _wood(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    period, heading = _drawn(rng, 20, 30), rng.uniform(0, 2 * math.pi)
    across, _ = _turned(heading, y, x)
    bend = _field(_waves(rng, 24, 72, 144, heading + math.pi / 2, 0.9), y, x)
    ring = torch.remainder(across / period + 0.35 * bend, 1.0)
    return _mix(palette, torch.minimum(ring, (1 - ring) * period / 6))


def _pebbles(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    size = _drawn(rng, 18, 28)
    along, across = _turned(rng.uniform(0, 2 * math.pi), y, x)
    near, gap, tone = _cells(rng, along / (1.2 * size), across / size)
    stone = _mix(palette, tone) * (1.08 - 0.6 * near**2)
    return palette[2] + (stone - palette[2]) * (gap / 0.22).clamp(0, 1)


def _ripples(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    period, heading = _drawn(rng, 18, 30), rng.uniform(0, 2 * math.pi)
    crest = _field(_waves(rng, 24, 0.85 * period, 1.2 * period, heading, 0.45), y, x)
    return _mix(palette, 0.5 + 0.5 * torch.tanh(1.4 * crest))


def _strokes(rng: np.random.Generator, palette: Tensor, y: Tensor, x: Tensor) -> Tensor:
    breadth = _drawn(rng, 16, 24)
    along, across = _turned(rng.uniform(0, 2 * math.pi), y, x)
    bend = _field(_waves(rng, 16, 64, 96), y, x)
    near, gap, tone = _cells(rng, along / (2.4 * breadth), (across + 4 * bend) / breadth)
    paint = _mix(palette[:2], (1.5 * tone).clamp(0, 1))
    paint = torch.where(tone > 2 / 3, palette[2], paint)
    return paint * (1 - 0.5 * (1 - gap / 0.2).clamp(0, 1)) * (1.05 - 0.2 * near)


_Draw = Callable[[np.random.Generator, Tensor, Tensor, Tensor], Tensor]
_DRAW: dict[str, _Draw] = dict(zip(MATERIALS, (_clouds, _marble, _wood, _pebbles, _ripples, _strokes), strict=True))


def _drawn(rng: np.random.Generator, low: float, high: float) -> float:
    """A length between two, uniform in its logarithm."""
    return low * (high / low) ** rng.uniform()


def _mix(palette: Tensor, share: Tensor) -> Tensor:
    """Between the palette's first colour and its second, (3, h, w)."""
    return palette[0] + (palette[1] - palette[0]) * share


def _turned(heading: float, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's coordinates along `heading` and across it, both (h, w)."""
    rows, columns = y[:, None], x[None]
    return (
        columns * math.cos(heading) + rows * math.sin(heading),
        rows * math.cos(heading) - columns * math.sin(heading),
    )


def _waves(
    rng: np.random.Generator,
    count: int,
    shortest: float,
    longest: float,
    heading: float = 0.0,
    spread: float = math.pi,
    slope: float = 0.0,
) -> np.ndarray:
    """Plane waves (4, count): radians per px to the right and downwards, phase, and amplitude ~ wavelength^slope.

    Wavelengths are from `shortest` to `longest` px, directions within `spread` of `heading`.
    """
    length = shortest * (longest / shortest) ** rng.uniform(size=count)
    angle = heading + rng.uniform(-spread, spread, count)
    amplitude = length**slope
    amplitude *= math.sqrt(2) / np.linalg.norm(amplitude)
    turn = 2 * math.pi / length
    return np.stack([turn * np.cos(angle), turn * np.sin(angle), rng.uniform(0, 2 * math.pi, count), amplitude])


def _field(waves: np.ndarray, y: Tensor, x: Tensor) -> Tensor:
    """The sum of plane waves (h, w), of variance 1: two matrix products, since cos(a + b) separates."""
    right, down, phase, amplitude = torch.tensor(waves, dtype=torch.float32, device=y.device)
    rows, columns = y[:, None] * down + phase, x[:, None] * right
    return (rows.cos() * amplitude) @ columns.cos().T - (rows.sin() * amplitude) @ columns.sin().T


def _cells(rng: np.random.Generator, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells around jittered grid points, at coordinates u and v (h, w) in cells.

    Returns:
        (h, w) each: distance to the nearest point, how much farther the second nearest is, and the cell's tone in 0..1.
    """
    table = rng.random((3, TABLE * TABLE))
    table[:2] = 0.1 + 0.8 * table[:2]
    right, down, tones = torch.tensor(table, dtype=torch.float32, device=u.device)
    first_u, first_v = u.floor(), v.floor()
    part_u, part_v = u - first_u, v - first_v  # of a cell
    rows, columns = first_u.long(), first_v.long()
    rows = [torch.remainder(rows + i, TABLE) * TABLE for i in (-1, 0, 1)]
    columns = [torch.remainder(columns + j, TABLE) for j in (-1, 0, 1)]
    near = far = torch.full_like(u, 81.0)
    nearest = torch.zeros_like(rows[0])
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            cell = rows[i + 1] + columns[j + 1]
            square = (right.take(cell) + (i - part_u)).square_() + (down.take(cell) + (j - part_v)).square_()
            nearest = torch.where(square < near, cell, nearest)
            far = torch.minimum(far, torch.maximum(near, square))
            near = torch.minimum(near, square)
    near, far = near.sqrt(), far.sqrt()
    return near, far - near, tones.take(nearest)

"""Judges an edit with many right answers, such as a texture, by the distribution of fresh right answers.

Every number is a distance to fresh answers in units of the distance between two sets of them. On average over right
answers it is 1.0, which is perfect; a single one lies around that, so compare means over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .texture_inputs import as_picture, as_pictures, as_region
from .texture_seam import profile
from .texture_statistics import Statistics, describe

Through = Callable[[Tensor], Tensor]
AT_ONCE = 4  # pictures that `through` gets per call
LEAST = 1e-6  # of a unit, so that fresh answers that are all alike do not divide by zero


@dataclass(frozen=True)
class Reference:
    """Two sets of fresh answers: each one's mean of every statistic, and the distance between the sets.

    That is the mean distance of one set's pictures from the other's mean, both ways.
    """

    centres: tuple[Statistics, Statistics]
    unit: dict[str, float]

    @classmethod
    def of(cls, found_a: Statistics, found_b: Statistics) -> Reference:
        """From the statistics of the two sets, each (n, length)."""
        a, b = ({name: values.mean(0) for name, values in found.items()} for found in (found_a, found_b))
        unit = {name: (_away(found_b[name], a[name]) + _away(found_a[name], b[name])) / 2 for name in a}
        return cls((a, b), {name: max(value, LEAST) for name, value in unit.items()})

    def distance(self, found: Statistics) -> dict[str, float]:
        """`distance`, the mean over the statistics, and each by its name. `found`: of one picture, (1, length)."""
        a, b = self.centres
        parts = {n: (_away(found[n], a[n]) + _away(found[n], b[n])) / 2 / self.unit[n] for n in self.unit}
        return {"distance": sum(parts.values()) / len(parts), **parts}

    def surprise(self, found: Statistics) -> float:
        """Mean negative log-likelihood of one picture's statistics, their distances exponentially distributed.

        Unlike the distance it does not favour a material whose answers differ much from each other.
        """
        parts = self.distance(found)
        return sum(parts[name] + math.log(unit) for name, unit in self.unit.items()) / len(self.unit)


def _away(found: Tensor, centre: Tensor) -> float:
    return float((found - centre).abs().mean())


def texture_distance(
    generated: Any, region: Any, fresh_a: Any, fresh_b: Any, through: Through | None = None
) -> dict[str, float]:
    """How far a picture's texture is from fresh ones: 1.0 for right answers on average, more for worse ones.

    For each statistic, the distance of the picture's from the mean of a set of fresh pictures, divided by the distance
    of other fresh pictures from it; the two sets change places. `distance` is the mean of these ratios.

    Args:
        generated: (3, h, w) floating in 0..1 or (h, w, 3) uint8, a tensor or an array, or a PIL image.
        region: (h, w) bool, the pixels to judge.
        fresh_a, fresh_b: different right answers, (n, 3, h, w) floating or (n, h, w, 3) uint8. With 16 each, the unit
            is known to about a tenth.
        through: an editor's encoding and decoding, from (n, 3, h, w) in 0..1 to the same, for the fresh answers, so
            that the editor is not judged for its autoencoder.

    Returns:
        `distance`, and the ratios by name: spectrum, magnitudes, orientations, colours, patches_5, and patches_13 where
        patches of 13 px fit into the region.

    Raises:
        TypeError: another type or dtype.
        ValueError: another shape, values beyond 0..1, or a region that is empty or too small.
    """
    picture = as_picture("generated", generated)
    inside = as_region(region, picture)
    found = describe(picture[None], inside)
    return reference(picture, inside, fresh_a, fresh_b, through).distance(found)


def reference(like: Tensor, region: Tensor, fresh_a: Any, fresh_b: Any, through: Through | None = None) -> Reference:
    """What `texture_distance` compares with, to be used for several pictures; `like`: a picture of their size."""
    sets = [as_pictures(name, fresh, like) for name, fresh in (("fresh_a", fresh_a), ("fresh_b", fresh_b))]
    return Reference.of(*(describe(passed(fresh, through), region) for fresh in sets))


def material(generated: Any, region: Any, fresh: Mapping[str, tuple[Any, Any]]) -> str:
    """The name in `fresh`, from a material's name to two sets of its renders, that is nearest to `generated`.

    That is the one under which the statistics are likeliest. Arguments and errors are as of `texture_distance`.
    """
    picture = as_picture("generated", generated)
    inside = as_region(region, picture)
    return nearest(describe(picture[None], inside), {m: reference(picture, inside, *fresh[m]) for m in fresh})


def nearest(found: Statistics, references: Mapping[str, Reference]) -> str:
    """The name of the reference under which the statistics of one picture are likeliest."""
    if not references:
        raise ValueError("fresh: expected at least one material, got none")
    return min(references, key=lambda name: references[name].surprise(found))


def seam(generated: Any, region: Any, fresh_a: Any, fresh_b: Any, through: Through | None = None) -> float:
    """Whether the region's border looks as in fresh right answers: 1.0 as there on average, more with a seam.

    Compares the strength of gradients across the border, at each distance from it up to 8 px on both sides. All
    pictures are whole: the texture in the region and the rest of the picture around it. A weaker border, such as a
    blurred one, counts as much as a stronger one.

    Args, Raises: as of `texture_distance`.

    Returns:
        nan if the region has no border because it is the whole picture.
    """
    picture = as_picture("generated", generated)
    inside = as_region(region, picture)
    if bool(inside.all()):
        return float("nan")
    known = seam_reference(picture, inside, fresh_a, fresh_b, through)
    return known.distance({"seam": profile(picture[None], inside)})["distance"]


def seam_reference(
    like: Tensor, region: Tensor, fresh_a: Any, fresh_b: Any, through: Through | None = None
) -> Reference:
    """What `seam` compares with, to be used for several pictures; `like`: a picture of their size."""
    sets = [as_pictures(name, fresh, like) for name, fresh in (("fresh_a", fresh_a), ("fresh_b", fresh_b))]
    return Reference.of(*({"seam": profile(passed(fresh, through), region)} for fresh in sets))


def passed(pictures: Tensor, through: Through | None) -> Tensor:
    """The pictures after `through`, a few at a time.

    Raises:
        ValueError: `through` returns another shape.
    """
    if through is None:
        return pictures
    with torch.no_grad():
        out = torch.cat([through(part) for part in pictures.split(AT_ONCE)]).float().cpu()
    if out.shape != pictures.shape:
        raise ValueError(f"through: expected pictures {tuple(pictures.shape)}, got {tuple(out.shape)}")
    return out.clamp(0, 1)

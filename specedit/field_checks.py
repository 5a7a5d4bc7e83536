"""Checks of the fields of `SpecEditConfig`, each of which returns the field as it is stored.

Raises everywhere: TypeError, ValueError naming the field, what was expected and what came.
"""

from __future__ import annotations

import math
from typing import Any

from .checks import integer, number, sequence

MAX_SCORE = 4.0  # squared distance of two unit vectors


def steps(value: Any) -> tuple[int, int, int]:
    """Steps of the (coarse, mixed, full) stage."""
    expected = "three integers (coarse, mixed, full) of at least 0"
    coarse, mixed, full = (integer("steps", n, 0, expected) for n in sequence("steps", value, 3, expected))
    if coarse + mixed + full == 0:
        raise ValueError(f"steps: expected at least one step in all, got {(coarse, mixed, full)}")
    return coarse, mixed, full


def taken_steps(steps: tuple[int, int, int], restore: str) -> tuple[int, int, int]:
    """Steps as the stages take them: on the mixed sequence also those of the full stage with restore="reference", and
    all but one of them with restore="pixels"."""
    coarse, mixed, full = steps
    last = {"reference": 0, "pixels": 1}.get(restore, full)
    return coarse, mixed + full - last, last


def first_step(steps: int, strength: float) -> int:
    """The first of `steps` that a run of `strength` takes, by the rule of the stock pipelines' `get_timesteps`."""
    return int(max(steps - min(steps * strength, steps), 0))


def scaled_steps(old: tuple[int, int, int], n: int) -> tuple[int, int, int]:
    """`n` steps in the proportions of `old` (largest remainder).

    A stage that had steps keeps at least one while `n` allows; when it does not, the last stages are kept.
    """
    kept = [i for i, count in enumerate(old) if count][-n:]
    total = sum(old[i] for i in kept)
    shares = {i: n * old[i] / total for i in kept}
    new = [max(1, math.floor(shares[i])) if i in shares else 0 for i in range(3)]
    # Raising a stage to its one step can overshoot; then the stage furthest above its share gives one back.
    while sum(new) > n:
        new[max((i for i in kept if new[i] > 1), key=lambda i: new[i] - shares[i])] -= 1
    while sum(new) < n:
        new[max(kept, key=lambda i: shares[i] - new[i])] += 1
    return new[0], new[1], new[2]


def scaled_stages(old: tuple[int, int, int], restore: str, n: int) -> tuple[int, int, int]:
    """`scaled_steps` of a configuration: one without a mixed stage does not get one.

    With restore="pixels" a second full step would run on the mixed sequence.
    """
    coarse_alone = restore == "pixels" and taken_steps(old, restore)[1] == 0
    return (n - 1, 0, 1) if coarse_alone else scaled_steps(old, n)


def boundaries(value: Any) -> tuple[float, float]:
    """Sigmas at which the coarse and the mixed stage end."""
    expected = "two sigmas (s1, s2) with 0 < s1 < 1 and 0 < s2 < 2*s1/(1+s1)"
    s1, s2 = (number("boundaries", s, expected) for s in sequence("boundaries", value, 2, expected))
    if not (0 < s1 < 1 and 0 < s2 < 2 * s1 / (1 + s1)):
        raise ValueError(f"boundaries: expected {expected}, got {value!r}")
    return s1, s2


def pixel_restore_sigma(value: Any) -> float:
    """The noise level from which pixel restore takes its step."""
    expected = "a sigma with 0 < sigma < 1"
    checked = number("pixel_restore_sigma", value, expected)
    if not 0 < checked < 1:
        raise ValueError(f"pixel_restore_sigma: expected {expected}, got {value!r}")
    return checked


def threshold(value: Any, default: float) -> float:
    """The score above which a cell is edited; `default` for None."""
    expected = f"a number from 0 to {MAX_SCORE:g}, or None for the default of verify_at"
    if value is None:
        return default
    checked = number("threshold", value, expected)
    if not (math.isfinite(checked) and 0 <= checked <= MAX_SCORE):
        raise ValueError(f"threshold: expected {expected}, got {value!r}")
    return checked


def reference_keep(value: Any) -> float | None:
    """The share of the reference's tokens that is kept."""
    expected = "a share above 0, at most 1, or None"
    if value is None:
        return None
    checked = number("reference_keep", value, expected)
    if not 0 < checked <= 1:
        raise ValueError(f"reference_keep: expected {expected}, got {value!r}")
    return checked


def guidance_range(value: Any, forecast: Any) -> tuple[float, float] | None:
    """Sigmas between which true guidance runs. forecast: the field of that name, which excludes it."""
    if value is None:
        return None
    expected = "two sigmas (low, high) with 0 <= low < high <= 1, or None"
    low, high = (number("guidance_range", s, expected) for s in sequence("guidance_range", value, 2, expected))
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_range: expected {expected}, got {value!r}")
    if forecast is not None:
        raise ValueError(
            f"guidance_range: expected None with forecast={forecast!r}, whose histories need every guidance "
            f"branch in every step, got {value!r}"
        )
    return low, high

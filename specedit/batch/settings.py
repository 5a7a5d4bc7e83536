"""Settings of a row: the options of `specedit edit` by name, and any field of SpecEditConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from ..checks import integer, number, suggest
from ..config import SpecEditConfig, resolve

CALL = ("steps", "size", "seed", "negative_prompt", "true_cfg_scale")  # arguments of the call
FIELDS = tuple(f.name for f in dataclasses.fields(SpecEditConfig))
NAMES = ("preset", *CALL, *(name for name in FIELDS if name not in CALL))
SIDES = (64, 4096)  # px
STEPS = (1, 1000)
SCALE = (0, 100)
SEEDS = 2**63


@dataclass(frozen=True)
class Settings:
    """Checked settings. steps: model evaluations in the preset's proportions. size: px of the longer side at most."""

    config: SpecEditConfig
    steps: int | None = None
    size: int | None = None
    seed: int = 0
    guidance: dict[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> SpecEditConfig:
        """The configuration with the steps that run."""
        return self.config if self.steps is None else self.config.with_steps(self.steps)


def check(given: Mapping[str, Any]) -> Settings:
    """Settings by name, as `merged` returns them, checked.

    `steps` is a number of model evaluations, or three numbers, SpecEditConfig's field.

    Raises:
        TypeError, ValueError: naming the setting, what was expected and what came.
    """
    values = {name: _plain(value) for name, value in given.items()}
    for name in values:
        if name not in NAMES:
            hint = suggest(name, NAMES) or f"; they are {', '.join(NAMES)}"
            raise ValueError(f"settings: expected known names, got {name!r}{hint}")
    call = {name: values.pop(name) for name in CALL if name in values}
    if isinstance(call.get("steps"), tuple):
        values["steps"] = call.pop("steps")
    config = resolve(values.pop("preset", None), **values)
    settings = Settings(
        config, _within("steps", call, STEPS), _within("size", call, SIDES),
        _within("seed", call, (0, SEEDS - 1)) or 0, _guidance(call),
    )  # fmt: skip
    _ = settings.running  # rejects too few steps
    return settings


def merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The command's settings, overridden by a row's columns, and these by its column "settings".

    Raises:
        ValueError: "settings" is neither an object nor the JSON of one.
    """
    columns = {name: value for name, value in values.items() if name in NAMES}
    inner = parsed("settings", values.get("settings", {}))
    if not isinstance(inner, dict):
        raise ValueError(f"settings: expected an object of settings, got {inner!r}")
    return {**defaults, **columns, **{name: value for name, value in inner.items() if value is not None}}


def parsed(name: str, value: Any) -> Any:
    """What the JSON in a string holds; other values as they are. ValueError for a string that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected a JSON object, got {value!r}: {error}") from error


def _plain(value: Any) -> Any:
    """Lists as tuples; whole floats, which tables make of integers with gaps, as integers."""
    if isinstance(value, list):
        return tuple(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _within(name: str, call: Mapping[str, Any], bounds: tuple[int, int]) -> int | None:
    value = call.get(name)
    if value is None:
        return None
    low, high = bounds
    expected = f"a whole number from {low:,} to {high:,}"
    if not isinstance(value, Integral):
        expected += ", or three of the stages" * (name == "steps")
    if integer(name, value, low, expected) > high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def _guidance(call: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: call[name] for name in ("negative_prompt", "true_cfg_scale") if name in call}
    if not isinstance(given.get("negative_prompt", ""), str):
        raise TypeError(f"negative_prompt: expected a text, got {given['negative_prompt']!r}")
    if "true_cfg_scale" in given:
        expected = f"a number from {SCALE[0]} to {SCALE[1]}"
        scale = number("true_cfg_scale", given["true_cfg_scale"], expected)
        if not SCALE[0] <= scale <= SCALE[1]:
            raise ValueError(f"true_cfg_scale: expected {expected}, got {scale:g}")
        given["true_cfg_scale"] = scale
    return given

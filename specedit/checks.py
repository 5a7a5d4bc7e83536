"""Checks of single values that configuration and options share."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, low: int, what: str | None = None) -> int:
    """`value` as an int of at least `low`. TypeError or ValueError names the field, what was expected and what came."""
    expected = what or f"an integer of at least {low}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def number(name: str, value: Any, expected: str) -> float:
    """`value` as a float. TypeError names the field, what was expected and what came."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    return float(value)


def share(name: str, value: Any) -> float:
    """`value` as a float above 0, at most 1. TypeError or ValueError as above."""
    expected = "a number above 0, at most 1"
    checked = number(name, value, expected)
    if not 0 < checked <= 1:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return checked

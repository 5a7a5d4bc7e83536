"""Checks of single values that configuration and options share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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


def sequence(name: str, value: Any, length: int, expected: str) -> tuple[Any, ...]:
    """A tuple or list of `length` values as a tuple. TypeError or ValueError as above."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    if len(value) != length:
        raise ValueError(f"{name}: expected {expected}, got {len(value)} values: {value!r}")
    return tuple(value)


def suggest(word: object, known: Iterable[str]) -> str:
    """The hint "; did you mean ...?" with the closest of the known words, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""Bounds of numeric options, checked before any work."""

from __future__ import annotations

import argparse
import math

from .errors import CLIError

STEPS = (1, 1000)  # model evaluations
SCALE = (0, 100)  # of guidance
CASES = (1, 1_000_000)
LARGEST_EMBEDDED = 1024  # px a side; the embedded editors were trained at up to 512


def check_numbers(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """Check that each given option lies within its (low, high) of `bounds`.

    Raises:
        CLIError: naming the option, its bounds and its value; nan is out of bounds.
    """
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is None or (math.isfinite(value) and low <= value <= high):
            continue
        what = "a whole number" if isinstance(value, int) else "a number"
        raise CLIError(f"--{name.replace('_', '-')}: expected {what} from {low:,} to {high:,}, got {value:,}")


def check_size(size: int, low: int, high: int) -> None:
    """Check that a side is within bounds and a multiple of the token size."""
    if not low <= size <= high or size % 16:
        raise CLIError(f"--size: expected a multiple of 16 from {low} to {high}, got {size}")


def seed_number(text: str) -> int:
    """A seed that torch's generators accept."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)

"""Numbers that evaluations share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """PSNR in dB of uint8 images (H, W, 3) over the pixels `where` (H, W); at most 60, so that means stay finite."""
    if not where.any():
        return math.nan
    error = np.square(a[where].astype(np.float64) - b[where].astype(np.float64)).mean() / 255**2
    return 60.0 if error == 0 else min(60.0, -10 * math.log10(error))


def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every number over the rows that have it, ignoring nan; `count` is the number of rows."""
    out: dict[str, float] = {"count": len(rows)}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("seed", "kind")):
        values = [float(row[name]) for row in rows if name in row and not math.isnan(row[name])]
        out[name] = sum(values) / len(values) if values else math.nan
    return out

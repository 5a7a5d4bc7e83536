"""Temporal feature caches: one small file each behind one protocol (`base.Forecaster`)."""

from .base import Forecaster, full_steps
from .histories import METHODS, TOKEN_WISE, Done, Histories, forecast_flops
from .reference import KeptReference

__all__ = [
    "METHODS", "TOKEN_WISE", "Done", "Forecaster", "Histories", "KeptReference", "forecast_flops", "full_steps",
]  # fmt: skip

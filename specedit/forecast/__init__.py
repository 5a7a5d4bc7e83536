"""Temporal feature caches: one small file each behind one protocol (`base.Forecaster`)."""

from .base import Forecaster, full_steps
from .kv_cache import ReferenceKVCache
from .runner import METHODS, TOKEN_WISE, ForecastRunner, StepKind, forecast_flops

__all__ = [
    "METHODS", "TOKEN_WISE", "ForecastRunner", "Forecaster", "ReferenceKVCache", "StepKind", "forecast_flops",
    "full_steps",
]  # fmt: skip

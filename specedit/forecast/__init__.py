"""Temporal feature caches: one file each behind one protocol. `base` explains how to add one.

The options of every registered method are found here by their class's name: `specedit.forecast.Taylor`.
"""

from typing import Any as _Any

from ..forecast_options import ForecastContext, ForecastOptions, SeriesOptions, register_forecast
from ..registry import forecasts as _forecasts
from .base import Forecaster, full_steps
from .kv_cache import Fusion, KVCache, LockedKVCache, PartialForward, ReferenceKVCache, TokenKVCache
from .runner import ForecastRunner, StepKind

__all__ = [
    "ForecastContext", "ForecastOptions", "ForecastRunner", "Forecaster", "Fusion", "KVCache", "LockedKVCache",
    "PartialForward", "ReferenceKVCache", "SeriesOptions", "StepKind", "TokenKVCache", "full_steps",
    "register_forecast",
]  # fmt: skip


def __getattr__(name: str) -> _Any:
    if name[:1].isupper():  # not a submodule that is being imported
        for options in _forecasts.values():
            if options.__name__ == name:
                return options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The caches of a group: a temporal one, and kept keys and values. Each ends with its stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..forecast import ForecastRunner, LockedKVCache, ReferenceKVCache
from .adapter import LayoutGroup, Run
from .locked import fine_index


def cache_maker(run: Run) -> Callable[[list[LayoutGroup], bool], None]:
    """A function of groups and whether their stage is the run's first, which gives them their caches."""
    make_forecast = forecast_maker(run)

    def attach(groups: list[LayoutGroup], first: bool) -> None:
        for group in (group.computed for group in groups):
            if make_forecast is not None:
                group.forecast = make_forecast(first=first, layout=group.layout)
            group.kv = reference_kv_cache(run) if group.locked is None else LockedKVCache(fine_index(group))

    return attach


def drop_caches(groups: list[LayoutGroup]) -> None:
    """Free the caches of a stage that has ended."""
    for group in groups:
        group.computed.forecast = group.computed.kv = None
        group.computed.inputs.clear()
        group.inputs.clear()


def reference_kv_cache(run: Run) -> ReferenceKVCache | None:
    """What a group will keep of text and reference, or None where the configuration keeps nothing."""
    refresh = run.config.reference_refresh
    return None if refresh is None else ReferenceKVCache(refresh)


def forecast_maker(run: Run) -> Callable[..., ForecastRunner] | None:
    """What makes a group's temporal cache, or None where the configuration has none."""
    options = run.config.forecast_options
    if options is None:
        return None
    shared = options.prepare(run.pipe)
    return partial(ForecastRunner, options, branches=run.state.branches, shared=shared, backend=run.state.backend)

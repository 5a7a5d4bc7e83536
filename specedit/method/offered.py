"""What a configuration needs that not every adapter offers."""

from __future__ import annotations

from ..config import SpecEditConfig
from .adapter import Adapter


def check(adapter: Adapter, config: SpecEditConfig) -> None:
    """ValueError where the adapter cannot do what the configuration asks for."""
    method, options = config.method_options, config.forecast_options
    if method is not None and (reason := method.refusal(adapter)) is not None:
        raise ValueError(f"method: expected another one for {adapter.name}, {reason}, got {method.name!r}")
    if options is not None and options.token_wise and not adapter.token_wise:
        raise ValueError(
            f"forecast: {options.name!r} computes single tokens again, which {adapter.name} does not offer; expected "
            "another forecast"
        )
    if adapter.fixed_prefix:
        check_prefix(adapter, config)
    if config.rope == "phase_aligned" and not adapter.aligns_phases:
        raise ValueError(
            f"rope: expected 'scaled' for {adapter.name}, which rotates keys at one scale, got 'phase_aligned'"
        )
    if config.reference_refresh is not None and not adapter.keeps_reference:
        raise ValueError(
            f"reference_refresh: expected None for {adapter.name}, which cannot compute the target's tokens alone, "
            f"got {config.reference_refresh}"
        )
    if config.locked == "cached" and not adapter.skips_tokens:
        raise ValueError(
            f"locked: expected 'coarse' or 'reference' for {adapter.name}, which cannot compute some target tokens "
            "with the keys and values of the others, got 'cached'"
        )
    if config.restore == "pixels" and not adapter.encodes_pixels:
        raise ValueError(
            f"restore: expected 'full' or 'reference' for {adapter.name}, which does not encode pictures, got 'pixels'"
        )
    if config.decode == "edited" and not adapter.decodes_boxes:
        raise ValueError(f"decode: expected 'full' for {adapter.name}, which decodes whole pictures only, got 'edited'")
    if config.reference_keep is not None and not adapter.measures_attention:
        raise ValueError(
            f"reference_keep: expected None for {adapter.name}, which does not measure attention, got "
            f"{config.reference_keep}"
        )


def check_prefix(adapter: Adapter, config: SpecEditConfig) -> None:
    """ValueError where a configuration changes text or references between steps, of a model that computes them once."""
    once = f"for {adapter.name}, which computes text and references once a run"
    if config.reference_refresh is not None:
        raise ValueError(f"reference_refresh: expected None {once}, got {config.reference_refresh}")
    if config.draft_condition != "full":
        raise ValueError(f"draft_condition: expected 'full' {once}, got {config.draft_condition!r}")

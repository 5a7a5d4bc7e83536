"""What a configuration needs that not every adapter offers."""

from __future__ import annotations

from .adapter import Run


def check(run: Run) -> None:
    """ValueError where the adapter cannot do what the configuration asks for."""
    adapter, config = run.adapter, run.config
    if config.locked == "cached" and not adapter.skips_tokens:
        raise ValueError(
            f"locked: expected 'coarse' or 'reference' for {adapter.name}, which cannot compute some target tokens "
            "with the keys and values of the others, got 'cached'"
        )
    if config.restore == "pixels" and not adapter.encodes_pixels:
        raise ValueError(
            f"restore: expected 'full' or 'reference' for {adapter.name}, which does not encode pictures, got 'pixels'"
        )
    if config.reference_keep is not None and not adapter.measures_attention:
        raise ValueError(
            f"reference_keep: expected None for {adapter.name}, which does not measure attention, got "
            f"{config.reference_keep}"
        )

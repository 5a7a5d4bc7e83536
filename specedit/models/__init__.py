"""One adapter for each model family."""

from .flux import FluxKontext


def adapters() -> tuple[type, ...]:
    """Every adapter this package has."""
    return (FluxKontext,)

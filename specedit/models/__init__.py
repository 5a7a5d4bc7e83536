"""One adapter for each model family."""

from .flux import FluxKontext
from .qwen import QwenImageEdit, QwenImageEditPlus


def adapters() -> tuple[type, ...]:
    """Every adapter this package has."""
    return (FluxKontext, QwenImageEdit, QwenImageEditPlus)

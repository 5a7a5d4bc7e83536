"""One adapter for each model family."""

from .flux import FluxKontext
from .qwen import QwenImageEdit, QwenImageEditPlus

try:
    from .longcat import LongCatImageEdit
except ImportError:  # an older diffusers does not have the pipeline
    LongCatImageEdit = None


def adapters() -> tuple[type, ...]:
    """Every adapter this package has that the installed diffusers has a pipeline for."""
    return tuple(a for a in (FluxKontext, QwenImageEdit, QwenImageEditPlus, LongCatImageEdit) if a is not None)

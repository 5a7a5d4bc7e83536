"""One adapter for each model family."""

from typing import Any

from ..versions import check_diffusers, suppress_torchvision_warning

check_diffusers()  # an older one lacks what the adapters import, and python's own error would not say why

with suppress_torchvision_warning():
    from .flux import FluxKontext
    from .qwen.edit import QwenImageEdit, QwenImageEditPlus

    try:
        from .longcat import LongCatImageEdit
    except ImportError:  # an older diffusers does not have the pipeline
        LongCatImageEdit = None


def adapters() -> tuple[type, ...]:
    """Every adapter this package has that the installed diffusers has a pipeline for."""
    return tuple(a for a in (FluxKontext, QwenImageEdit, QwenImageEditPlus, LongCatImageEdit) if a is not None)


def adapter_of(pipe: Any) -> Any:
    """An adapter for `pipe`, or None where there is no such one."""
    return next((adapter() for adapter in adapters() if adapter.matches(pipe)), None)

"""One adapter for each model family."""

from typing import Any

from ..versions import check_diffusers, no_word_of_torchvision

check_diffusers()  # an older one lacks what the adapters import, and python's own error would not say why

with no_word_of_torchvision():
    from .flux import FluxKontext
    from .qwen import QwenImageEdit, QwenImageEditPlus

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


def pipeline_names() -> list[str]:
    """The pipeline classes that this package accelerates, for messages."""
    return [adapter.pipelines for adapter in adapters()]


def takes_class(pipeline: type) -> bool:
    """Whether `install` takes pipelines of this class; inpainting ones it leaves as they are."""
    return "Inpaint" in pipeline.__name__ or not {base.__name__ for base in pipeline.__mro__}.isdisjoint(
        pipeline_names()
    )

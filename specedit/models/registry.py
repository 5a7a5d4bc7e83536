"""Model adapters by name: built-in ones, and those that others register."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from ..method.adapter import Adapter
from ..registry import Registry
from ..released import Released
from ..versions import suppress_torchvision_warning

A = TypeVar("A", bound=type[Adapter])
ADAPTERS: Registry[type[Adapter]] = Registry("adapter", "specedit.models", "specedit.adapters")


def register_adapter(cls: A) -> A:
    """Have `install` serve the pipelines that `cls.matches`; returns `cls`, so it also works as a decorator.

    Where several adapters match a pipeline, a subclass wins over its base, and otherwise the one registered last, so
    an adapter for a derived pipeline class needs no change to the adapter of its base.

    Raises:
        TypeError: `cls` is not a subclass of `Adapter`, leaves methods abstract, or has no `name` or `pipelines`.
        ValueError: another adapter has the name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise TypeError(f"adapter: expected a subclass of specedit.method.adapter.Adapter, got {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"adapter: expected {cls.__name__} to define every abstract method, got none for {missing}")
    for attribute in ("name", "pipelines"):
        value = getattr(cls, attribute, None)
        if not isinstance(value, str) or not value:
            raise TypeError(f"adapter: expected {cls.__name__}.{attribute} as a string, got {value!r}")
    return ADAPTERS.register(cls.name, cls)


def adapters() -> tuple[type[Adapter], ...]:
    """Every registered adapter by name; built-in ones only where the installed diffusers has their pipeline."""
    return tuple(sorted(_registered(), key=lambda adapter: adapter.name))


def adapter_of(pipe: Any) -> Adapter | None:
    """An adapter for `pipe`, or None. See `register_adapter` for which one wins."""
    best: type[Adapter] | None = None
    for adapter in _registered():
        if adapter.matches(pipe) and not (best is not None and issubclass(best, adapter)):
            best = adapter
    return None if best is None else best()


def _registered() -> tuple[type[Adapter], ...]:
    """Adapters in the order of their registration."""
    with suppress_torchvision_warning():
        return ADAPTERS.values()


def released_models() -> dict[str, tuple[Released, ...]]:
    """The released models whose costs are known, by the pipeline class that runs them."""
    return {name.strip(): one.released for one in adapters() for name in one.pipelines.split(",") if one.released}


def pipeline_names() -> list[str]:
    """The pipeline classes that `install` serves, for messages."""
    return [adapter.pipelines for adapter in adapters()]


def takes_class(pipeline: type) -> bool:
    """Whether `install` takes pipelines of this class. It leaves inpainting ones as they are."""
    served = {name.strip() for names in pipeline_names() for name in names.split(",")}
    return "Inpaint" in pipeline.__name__ or not served.isdisjoint(base.__name__ for base in pipeline.__mro__)

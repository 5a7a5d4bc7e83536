"""Packages whose public names are imported at their first use: `specedit --help` needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar


class LazyPackage(ModuleType):
    """A package that imports a name's module when the name is first asked for (PEP 562, as a class)."""

    _modules: ClassVar[Mapping[str, str]] = {}  # public name -> submodule that defines it

    def __getattr__(self, name: str) -> Any:
        source = self._modules.get(name)
        if source is None and (name.startswith("_") or find_spec(f"{self.__name__}.{name}") is None):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from .versions import suppress_torchvision_warning

        with suppress_torchvision_warning():
            module = import_module(f"{self.__name__}.{source or name}")
        value = module if source is None else getattr(module, name)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__.get("__all__", ())})


def lazy(package: str, **modules: str) -> None:
    """Make `package` lazy, from within its `__init__`.

    Args:
        package: its `__name__`.
        modules: for each public name the submodule that defines it. Other submodules are found by their own names.
    """
    module = sys.modules[package]
    module.__class__ = type("LazyPackage", (LazyPackage,), {"_modules": modules})

"""Named things that others may add to: adapters, selectors, forecasts. Built-ins come in through the same door."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name.

    The first look imports every module of `package`, each of which registers what it defines, and loads the entry
    points of `group`. So a new file is found without an edit elsewhere, and importing specedit costs nothing.

    Args:
        kind: what is registered, for messages ("forecast").
        package: the package whose modules hold the built-ins.
        group: the entry-point group of other distributions ("specedit.forecasts").
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind, self.package, self.group = kind, package, group
        self._items: dict[str, T] = {}
        self._found = False
        self._lock = RLock()

    def register(self, name: str, item: T) -> T:
        """Add `item` under `name`, and return it.

        Raises:
            TypeError: a name that is not a string, or is empty.
            ValueError: the name belongs to something else already.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"{self.kind}: expected a name, got {name!r}")
        with self._lock:
            if self._items.get(name, item) is not item:
                raise ValueError(f"{self.kind}: expected a new name, got {name!r}, which {self._items[name]!r} has")
            self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Take `name` out again; tests and notebooks that define a thing twice need it."""
        with self._lock:
            self._items.pop(name, None)

    def __getitem__(self, name: str) -> T:
        self._discover()
        if name in self._items:
            return self._items[name]
        close = difflib.get_close_matches(str(name), list(self._items), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(map(repr, self._items))
        raise ValueError(f"{self.kind}: expected one of {listed}, got {name!r}{hint}")

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(tuple(self._items))

    def values(self) -> tuple[T, ...]:
        """Everything registered, built-ins first."""
        self._discover()
        return tuple(self._items.values())

    def _discover(self) -> None:
        if self._found:
            return
        with self._lock:
            if self._found:
                return
            self._found = True  # modules of the package look names up while they are imported
            try:
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
                    importlib.import_module(module.name)
                for entry in entry_points(group=self.group):
                    entry.load()
            except BaseException:
                self._found = False
                raise

"""Named things that others may add to: adapters, selectors, forecasts, methods. Built-ins use the same door."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .checks import suggest

if TYPE_CHECKING:
    from .forecast_options import ForecastOptions
    from .method_options import Method

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name, each registered by the file that defines it.

    Looking up a name imports the module of `package` that bears it. A name without such a module, and a listing,
    import every module of the package and load the entry points of `group`. So a new file is found without an edit
    elsewhere, importing specedit costs nothing, and a built-in does not depend on what else is installed.

    Args:
        kind: what is registered, for messages ("forecast").
        package: the package whose modules hold the built-ins.
        group: the entry-point group of other distributions ("specedit.forecasts"). An entry point names a class, or a
            module that registers some when it is imported. One that fails is left out with a warning.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind, self.package, self.group = kind, package, group
        self._items: dict[str, T] = {}
        self._complete = self._discovering = False
        # Two locks: a module that another thread is importing must be able to register while this one discovers.
        self._discovery, self._writing = RLock(), Lock()

    def register(self, name: str, item: T) -> T:
        """Add `item` under `name`, and return it.

        Raises:
            TypeError: a name that is not a string, or is empty.
            ValueError: the name belongs to something else already.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"{self.kind}: expected a name, got {name!r}")
        with self._writing:
            if self._items.get(name, item) is not item:
                raise ValueError(f"{self.kind}: expected a new name, got {name!r}, which {self._items[name]!r} has")
            self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Take `name` out again, for tests and for notebooks that define a class twice."""
        with self._writing:
            self._items.pop(name, None)

    def __getitem__(self, name: str) -> T:
        """What bears `name`. ValueError lists the known names and suggests the closest one."""
        if name not in self:
            raise self.unknown(name)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._items and name in self._modules():
            self._import(name)
        if name not in self._items:
            self._discover()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._items))

    def values(self) -> tuple[T, ...]:
        """Everything registered, in the order of registration."""
        self._discover()
        return tuple(self._items.values())

    def check(self, name: object) -> None:
        """ValueError unless `name` is known. Built-ins are not imported for it: the file's name is enough."""
        if not isinstance(name, str) or (name not in self._modules() and name not in self):
            raise self.unknown(name)

    def unknown(self, name: object, also: str = "") -> ValueError:
        """The error of an unknown name. also: what is accepted besides the names ("None or ")."""
        listed = ", ".join(map(repr, self))
        return ValueError(f"{self.kind}: expected {also}one of {listed}, got {name!r}{suggest(name, self)}")

    def _modules(self) -> list[str]:
        spec = importlib.util.find_spec(self.package)
        return [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else ())]

    def _discover(self) -> None:
        if self._complete:
            return
        with self._discovery:
            if self._complete or self._discovering:  # a module that looks names up while it is imported
                return
            self._discovering = True
            try:
                for module in self._modules():
                    self._import(module)
                for entry in importlib.metadata.entry_points(group=self.group):
                    self._load(entry)
                self._complete = True
            finally:
                self._discovering = False

    def _import(self, module: str) -> None:
        """Import a module of the package. One that fails or is interrupted leaves nothing registered."""
        try:
            importlib.import_module(f"{self.package}.{module}")
        except BaseException:
            for name, item in list(self._items.items()):
                if getattr(item, "__module__", "builtins") not in sys.modules:
                    self.unregister(name)
            raise

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        try:
            found: Any = entry.load()
            if isinstance(found, type):
                self.register(getattr(found, "name", entry.name), found)  # type: ignore[arg-type]
        except Exception as error:
            warnings.warn(
                f"entry point {entry.name!r} of {self.group} ({entry.value}) is left out, "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


methods: Registry[type[Method]] = Registry("method", "specedit.methods", "specedit.methods")
forecasts: Registry[type[ForecastOptions]] = Registry("forecast", "specedit.forecast", "specedit.forecasts")
selectors: Registry[Any] = Registry("selector", "specedit.method.selectors", "specedit.selectors")

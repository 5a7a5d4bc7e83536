"""Options of what is chosen by name, a frozen dataclass each: what forecasts and methods have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Fields with defaults, checked while they are being made. `name`: what the class is registered as."""

    name: str = field(default="", init=False, repr=False)  # a subclass sets it in its body

    def __post_init__(self) -> None:
        self.validate()

    def set(self, name: str, value: Any) -> None:
        """Put a checked value in its field, while the options are being made."""
        object.__setattr__(self, name, value)

    def validate(self) -> None:
        """Check the class's own fields: TypeError or ValueError, "field: expected ..., got ..."."""


def check_class(kind: str, made: Any, base: type) -> None:
    """TypeError unless `made` can be registered: a frozen dataclass that derives from `base`, leaves nothing abstract,
    and needs no argument, because its name alone has to be enough. kind: what it is, for messages."""
    if not (isinstance(made, type) and issubclass(made, base)):
        raise TypeError(f"{kind}: expected a class that derives from {base.__name__}, got {made!r}")
    if "__dataclass_fields__" not in vars(made) or not vars(made)["__dataclass_params__"].frozen:
        raise TypeError(f"{kind}: expected a class with @dataclass(frozen=True) below the decorator, got {made!r}")
    if missing := sorted(getattr(made, "__abstractmethods__", ())):
        raise TypeError(f"{kind}: expected a class that defines {', '.join(missing)}, got {made!r} without")
    if bare := [f.name for f in given_fields(made) if default_of(f) is dataclasses.MISSING]:
        raise TypeError(f"{kind}: expected defaults of all fields, got {made!r} without one of {', '.join(bare)}")


def given_fields(options: Any) -> list[dataclasses.Field[Any]]:
    """The fields of an options class, or of options, that a caller may give."""
    return [f for f in dataclasses.fields(options) if f.init]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field; `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_mapping(registry: Registry[type[T]], mapping: Mapping[str, Any], also: str = "") -> T:
    """Options from a mapping as `dataclasses.asdict` makes of them. also: what is accepted besides the names.

    Raises:
        TypeError: a field that the class does not have.
        ValueError: no known name, or whatever the class refuses.
    """
    fields = dict(mapping)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        raise registry.unknown(name, also)
    made = registry[name]
    known = [f.name for f in given_fields(made)]
    for option in fields:
        if option not in known:
            raise TypeError(f"{registry.kind}: expected fields of {made.__name__} ({', '.join(known)}), got {option!r}")
    return made(**fields)

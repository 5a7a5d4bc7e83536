"""What `SpecEditConfig.method` takes: options of another way to sample an edit. The methods are in `specedit.methods`.

SpecEdit itself is not among them: its options are the fields of `SpecEditConfig`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from .checks import suggest
from .method_plan import MethodRun, PlannedStage
from .options import Options, check_class, default_of, from_mapping, given_fields
from .registry import methods

OWN = "specedit"  # the method of specedit.method, which needs no options of its own


@dataclass(frozen=True)
class Method(Options, ABC):
    """Options of one method, and the method itself; a frozen dataclass derives from it.

    Attributes:
        name: `SpecEditConfig(method=name)`.
        uses: fields of SpecEditConfig that it reads, besides `attention`, `keep_pixels` and `reuse_encodings`. Any
            other that is set is an error.
        takes_mask: whether a caller's `edit_mask` decides what it computes. If not, a mask without keep_pixels is an
            error.
        needs_decoder: what it reads from the VAE's decoder: None, "features" or "picture".
        own_attention: whether it needs SpecEdit's own attention, so that attention="stock" is an error.
        lists_blocks: whether its attention skips blocks of keys, so that attention="merged" is an error too.
        published: the settings that its source reports, as options by the setting's name.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    takes_mask: ClassVar[bool] = False
    needs_decoder: ClassVar[Literal["features", "picture"] | None] = None
    own_attention: ClassVar[bool] = False
    lists_blocks: ClassVar[bool] = False
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def at(cls: type[Found], setting: str) -> Found:
        """The options of a published setting. ValueError lists them."""
        if setting not in cls.published:
            known = ", ".join(map(repr, cls.published)) or "none"
            raise ValueError(
                f"setting: expected a published one of {cls.name!r} ({known}), got {setting!r}"
                f"{suggest(setting, cls.published)}"
            )
        return cls(**cls.published[setting])

    @property
    def label(self) -> str:
        """The name, followed by the options that differ from the defaults, as "steps, count=10"."""
        changed = [f.name for f in given_fields(self) if getattr(self, f.name) != default_of(f)]
        return ", ".join([self.name, *(f"{name}={getattr(self, name)!r}" for name in changed)])

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Model evaluations of a run, those that caches answer included."""

    @abstractmethod
    def with_steps(self, n: int) -> Method:
        """The same method with `n` model evaluations: what a call's num_inference_steps asks for. n: at least 1.

        Raises:
            ValueError: the method cannot run so few.
        """

    def refusal(self, adapter: Any) -> str | None:
        """Why the method cannot run on this model family (one phrase), or None. adapter: a `method.adapter.Adapter`."""
        return None

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        """What a run will compute, stage by stage, as its report will say. ValueError where it is not known before."""
        raise ValueError(f"method: expected one whose cost is known beforehand, got {self.name!r}")

    @abstractmethod
    def edit(self, run: Any, edit_mask: Any = None) -> Any:
        """Edit one batch: a `method.adapter.Run` to a `method.sampler.Outcome`.

        edit_mask: the caller's, as `specedit.method.masks.read` returns it, or None.
        """


Found = TypeVar("Found", bound=Method)
MethodClass = TypeVar("MethodClass", bound=type[Method])


def register_method(method: MethodClass) -> MethodClass:
    """Make a method known by its name: `specedit.install(pipe, method="name")`. Use it as a decorator.

    Args:
        method: a frozen dataclass that derives from `Method`, has a `name`, and gives every field a default.

    Raises:
        TypeError: it is not such a class.
        ValueError: another method has its name.
    """
    check_class("method", method, Method)
    if method.name == OWN:
        raise ValueError(f"method: expected a new name, got {OWN!r}, which SpecEdit has")
    return methods.register(method.name, method)  # type: ignore[return-value]


def method_of(value: object) -> Method | None:
    """Options from `SpecEditConfig.method`: a name, options, or a mapping as `dataclasses.asdict` makes of them.

    None for SpecEdit itself. TypeError or ValueError names what was expected and what came.
    """
    if value == OWN:
        return None
    if isinstance(value, Method):
        return value
    fields = value if isinstance(value, Mapping) else {"name": value}
    if fields == {"name": OWN}:
        return None
    name = fields.get("name")
    if isinstance(name, type) and issubclass(name, Method):
        raise TypeError(f"method: expected a name or options, such as {name.__name__}(), got the class {name!r}")
    return from_mapping(methods, fields, f"{OWN!r} or ")

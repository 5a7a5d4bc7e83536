"""What `SpecEditConfig.forecast` takes: the options of a temporal cache. The caches are in `specedit.forecast`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .checks import integer
from .options import Options, check_class, from_mapping, given_fields
from .registry import forecasts

if TYPE_CHECKING:
    from .layout import MixedLayout

INTERVAL = 4
FIRST_FULL = 3  # full steps at the start of a run: "first_enhance" of the public TaylorSeer, ToCa and FoCa code


@dataclass(frozen=True)
class ForecastContext:
    """What a forecaster is made for: one stage of the samples that share a layout.

    Args:
        layout: of the target's tokens.
        warmup: full steps before the first forecast.
        backend: of specedit_kernels.
        shared: what the run's `prepare` returned.
    """

    layout: MixedLayout
    warmup: int = 1
    backend: str | None = None
    shared: Any = None


@dataclass(frozen=True)
class ForecastOptions(Options, ABC):
    """Options of one forecast method; a frozen dataclass derives from it. See `specedit.forecast.base`.

    Args:
        interval: one step in this many is computed fully, at least 2. The first steps of a stage always are.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    interval: int = INTERVAL

    token_wise: ClassVar[bool] = False  # whether steps between full ones compute some tokens

    def __post_init__(self) -> None:
        self.set("interval", integer("interval", self.interval, 2))
        super().__post_init__()

    @property
    def history(self) -> int:
        """Full steps that a forecast needs; a history does not outlive its stage."""
        return 1

    def warmup(self, first: bool) -> int:
        """Full steps at the start of a stage: what the method needs, in the run's first stage at least three."""
        return max(FIRST_FULL if first else 1, self.history)

    def prepare(self, pipe: Any) -> Any:
        """What all forecasters of a run share, such as trained weights. Errors here come before any work."""
        return None

    @abstractmethod
    def make(self, context: ForecastContext) -> Any:
        """The history of one guidance branch in one stage, a `specedit.forecast.Forecaster`."""

    @abstractmethod
    def operations(self, numbers: int) -> float:
        """Floating-point operations of one forecast of a feature of `numbers` elements."""

    # What only token-wise methods are asked.
    def recomputes(self, since: int) -> bool:
        """Whether the `since`-th step after a full one computes some tokens."""
        return False

    def fresh_tokens(self, tokens: int) -> int:
        """How many of `tokens` target tokens such a step computes."""
        return tokens


@dataclass(frozen=True)
class SeriesOptions(ForecastOptions):
    """Options of a method that evaluates a series of differences.

    Args:
        order: of the highest difference, at least 1. A forecast needs one full step more.
    """

    order: int = 2

    def __post_init__(self) -> None:
        self.set("order", integer("order", self.order, 1))
        super().__post_init__()

    @property
    def history(self) -> int:
        return self.order + 1

    def operations(self, numbers: int) -> float:
        return 2.0 * self.history * numbers  # a multiply-add for every term


ForecastClass = TypeVar("ForecastClass", bound=type[ForecastOptions])


def register_forecast(options: ForecastClass) -> ForecastClass:
    """Make a forecast method known by its name: `SpecEditConfig(forecast="name")`. Use it as a decorator.

    Args:
        options: a frozen dataclass that derives from `ForecastOptions`, has a `name`, and gives every field a default.

    Raises:
        TypeError: it is not such a class.
        ValueError: another method has its name.
    """
    check_class("forecast", options, ForecastOptions)
    return forecasts.register(options.name, options)  # type: ignore[return-value]


def options_of(
    forecast: object, given: dict[str, Any], named: Callable[[str], str] = "forecast_{}".format
) -> ForecastOptions:
    """Options from `SpecEditConfig.forecast` (a name, options, or a mapping as `dataclasses.asdict` makes of them).

    Args:
        given: fields that the configuration sets with a name, without those that are None.
        named: the configuration's name of such a field, for messages.
    """
    if isinstance(forecast, dict):
        forecast = from_mapping(forecasts, forecast)
    if isinstance(forecast, ForecastOptions):
        for name, value in given.items():
            raise ValueError(f"{named(name)}: expected None beside options, forecast={forecast!r}, got {value!r}")
        return forecast
    if not isinstance(forecast, str) or forecast not in forecasts:
        raise forecasts.unknown(forecast, "None or ")
    options = forecasts[forecast]
    known = {f.name for f in given_fields(options)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{named(name)}: expected None, forecast={forecast!r} has no {name}, got {value!r}")
    try:
        return options(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(named(str(error))) from None  # every message begins with the field

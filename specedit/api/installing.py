"""Installing SpecEdit on one pipeline instance, and taking it off again."""

from __future__ import annotations

import copyreg
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack

from ..config import DEFAULT_THRESHOLDS, SpecEditConfig, fitted, resolve
from ..hold import Hold
from ..method import offered
from ..method.adapter import Adapter
from ..method.selectors import reads_threshold
from ..models import adapter_of, adapters
from ..once import warn_caller
from ..overrides import Overrides
from ..run_report import RunReport
from ..versions import check_diffusers
from . import accelerated, served, sharing
from .call import call
from .doors import doors
from .installation import ATTRIBUTE, CallRecord, Calls, Installation, installation_of
from .stock import why_stock

P = TypeVar("P")  # the class of the pipeline


def install(pipe: P, config: str | SpecEditConfig | None = None, **overrides: Unpack[Overrides]) -> P:
    """Make one pipeline instance edit by SpecEdit; the same call then returns the same edit faster.

    Args:
        pipe: a diffusers FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImage21Pipeline,
            LongCatImageEditPipeline, Flux2Pipeline, Flux2KleinPipeline, Flux2KleinKVPipeline,
            FluxKontextInpaintPipeline, QwenImageEditInpaintPipeline or Flux2KleinInpaintPipeline.
        config: name of a preset (`specedit.presets` has them all; "balanced" if None) or SpecEditConfig.
        overrides: any field of SpecEditConfig.

    Returns:
        `pipe` itself. Installing again replaces the configuration.

    Raises:
        TypeError: a pipeline that is not supported, or an unknown field.
        ValueError: a preset or value that does not exist, fields that exclude each other, a method or a field that
            does not fit the model, or a pipeline that was loaded without its transformer. The pipeline stays as it was.
        FileNotFoundError: a forecast without trained weights for this model.
        ImportError: a diffusers that is too old.
    """
    check_diffusers()
    resolved = resolve(config, **overrides)
    _install(pipe, resolved)
    if not reads_threshold(resolved.selector) and resolved.threshold != DEFAULT_THRESHOLDS[resolved.verify_at]:
        warn_caller(f"threshold: {resolved.threshold:g} has no effect with selector={resolved.selector!r}")
    return pipe


def _install(pipe: Any, config: SpecEditConfig) -> None:
    old = installation_of(pipe)
    if old is not None and _in_place(pipe):
        config = fitted(config, skips_tokens=old.adapter.skips_tokens)
        _check_fit(config, old.adapter, pipe)
        old.calls = Calls()  # the reports were another configuration's
        old.config = config
        old.encodings.clear()
        return
    adapter = adapter_of(pipe)
    if adapter is None and "Inpaint" in type(pipe).__name__:
        # Inpainting has its own idea of what stays; the user loses nothing but the speed.
        warn_caller(f"SpecEdit leaves {type(pipe).__name__} as it is: inpainting runs the stock path")
        return
    if adapter is None:
        raise TypeError(not_supported(pipe))
    config = fitted(config, skips_tokens=adapter.skips_tokens)
    if pipe.transformer is None:
        raise ValueError(f"install: expected a {type(pipe).__name__} with a transformer, got one without")
    _check_fit(config, adapter, pipe)
    uninstall(pipe)  # what an installation that was interrupted left
    stock = type(pipe)
    installation = Installation(config, adapter, stock)
    if (reason := why_stock(pipe, adapter)) is not None:
        installation.warned.add(reason)  # warned now, not again at the call
        warn_caller(f"SpecEdit will run the stock pipeline: {reason}")
    try:
        setattr(pipe, ATTRIBUTE, installation)
        sharing.attach(pipe, installation)
        pipe.__class__ = _accelerated_class(stock)  # last: until here every call is the stock one
    except BaseException:
        uninstall(pipe)
        raise


def _check_fit(config: SpecEditConfig, adapter: Adapter, pipe: Any) -> None:
    """As `offered.check`; also raises what a forecast raises if this model lacks something, such as trained weights."""
    offered.check(adapter, config)
    if config.forecast_options is not None:
        config.forecast_options.prepare(pipe)


def not_supported(pipe: Any) -> str:
    """The message of `install` for a pipeline that no adapter takes."""
    known = [adapter.pipelines for adapter in adapters()]
    name, bases = type(pipe).__name__, [base.__name__ for base in type(pipe).__mro__]
    one_of = f"one of {', '.join(known)}"
    if "ModularPipeline" not in bases:
        return f"install: expected {one_of}, got {name}"
    plain = [base.replace("ModularPipeline", "Pipeline") for base in bases]
    instead = next((one for one in plain if one in known), one_of)
    return f"install: modular pipelines cannot be accelerated yet: expected {instead}, got {name}"


def _accelerated_class(stock: type) -> type:
    return accelerated.subclass(stock, call, __reduce_ex__=_reduce, __setstate__=_set_state, **doors(stock))


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """For copy and pickle: the class of an installed instance cannot be imported, so a copy makes its own."""
    state, old, stock = dict(vars(self)), installation_of(self), accelerated.stock_of(type(self))
    if old is None:  # uninstalled, but another library's patch keeps the class
        return vars(copyreg)["__newobj__"], (stock,), state
    state[ATTRIBUTE] = Installation(old.config, old.adapter, stock)  # a copy has made no calls
    return _blank, (stock,), state


def _blank(stock: type) -> Any:
    return object.__new__(_accelerated_class(stock))


def _set_state(self: Any, state: dict[str, Any]) -> None:
    vars(self).update(state)
    installation = installation_of(self)
    if installation is not None and self.transformer is not None:
        sharing.attach(self, installation)  # the copy is another user, on the same transformer or its own


def uninstall(pipe: P) -> P:
    """Take SpecEdit off: class and attention processors are the original objects again. Without it, nothing happens.

    On a transformer that other installed pipelines share, the processors stay until the last of them is uninstalled;
    while a call is running, until it ends. They act as the stock ones in stock calls.
    """
    with Hold(sharing.LOCK):
        installation = installation_of(pipe)
        accelerated.restore_class(pipe)  # first: from here on every call is the stock one
        sharing.leave(pipe, installation, adapter_of(pipe) if installation is None else installation.adapter)
        if installation is not None:
            delattr(pipe, ATTRIBUTE)
    return pipe


def report(pipe: Any) -> RunReport:
    """What the calling thread's last call of an installed pipeline did; the last call of all where it has made none.

    The output of a call carries the same as its `report`.

    Raises:
        ValueError: SpecEdit is not installed, no call has been accelerated yet, or the last one ran the stock pipeline.
    """
    installation = installation_of(pipe)
    if installation is None:
        raise ValueError(f"report: expected a pipeline with SpecEdit installed, got a plain {type(pipe).__name__}")
    last = installation.calls.last or CallRecord()
    if last.report is None and last.stock_reason is not None:
        raise ValueError(
            f"report: expected an accelerated call, but the last one ran the stock pipeline: {last.stock_reason}"
        )
    if last.report is None:
        raise ValueError("report: expected at least one accelerated call, got none since install")
    return last.report


def serve_next(pipe: Any, settings: served.Served) -> None:
    """Have this thread's next call of `pipe` run with settings of its own.

    Raises:
        ValueError: SpecEdit is not installed, or the method or another field does not fit the model.
    """
    installation = installation_of(pipe)
    if installation is None:
        raise ValueError(f"expected a pipeline with SpecEdit installed, got a plain {type(pipe).__name__}")
    config = fitted(settings.config, skips_tokens=installation.adapter.skips_tokens)
    offered.check(installation.adapter, config)
    served.put(installation, dataclasses.replace(settings, config=config))


@contextmanager
def disabled(pipe: P) -> Iterator[P]:
    """Inside the block the pipeline runs its stock call, in this thread alone."""
    installation = installation_of(pipe)
    if installation is None:
        yield pipe
        return
    with installation.disabled.entered():
        yield pipe


def is_active(pipe: Any) -> bool:
    """Whether this thread's next call would run SpecEdit's loop (unless its arguments prevent that)."""
    installation = installation_of(pipe)
    return installation is not None and _in_place(pipe) and not installation.disabled.inside


def last_report(pipe: Any) -> RunReport | None:
    """The report of the calling thread's last call (else of the last of all), or None where it ran stock."""
    installation = installation_of(pipe)
    last = None if installation is None else installation.calls.last
    return None if last is None else last.report


def _in_place(pipe: Any) -> bool:
    """Whether a call of `pipe` comes here. It does not where an installation was interrupted, or a library has written
    another `__call__` over ours."""
    installation = installation_of(pipe)
    return installation is not None and accelerated.acts(pipe, installation.stock_class)

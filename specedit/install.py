"""Installing SpecEdit on one pipeline instance, and taking it off again."""

from __future__ import annotations

import copy
import inspect
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import restore, sampler
from .config import STOCK_STEPS, SpecEditConfig, resolve
from .models import adapter_of, adapters
from .models.base import Adapter
from .models.images import check_decoder
from .report import RunReport
from .schedule import supported
from .sizes import warn_if_cropped
from .step import forward_flops, tell_timestep
from .versions import check_diffusers

_ATTRIBUTE = "_specedit"


@dataclass
class Installation:
    """What hangs on an installed pipeline."""

    config: SpecEditConfig
    adapter: Adapter
    stock_class: type
    report: RunReport | None = None
    stock_reason: str | None = None  # why the last call ran the stock pipeline
    asleep: int = 0  # how many `disabled` blocks are open
    warned: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple:  # a copy of a pipeline has made no calls
        return Installation, (self.config, self.adapter, self.stock_class)


def install(pipe: Any, config: str | SpecEditConfig | None = None, **overrides: Any) -> Any:
    """Make one pipeline instance edit by SpecEdit; the same call then returns the same edit faster.

    Args:
        pipe: a diffusers FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline or
            LongCatImageEditPipeline.
        config: preset name ("quality", "balanced", "fast", "turbo", "lightning-8", "lightning-6") or SpecEditConfig.
        overrides: any field of SpecEditConfig.

    Returns:
        `pipe` itself. Installing again replaces the configuration.

    Raises:
        TypeError: a pipeline that is not supported, or an unknown field.
        ValueError: a preset or value that does not exist, or a pipeline that was loaded without its transformer.
        ImportError: a diffusers that is too old.
    """
    check_diffusers()
    config = resolve(config, **overrides)
    if (old := _installation(pipe)) is not None:
        old.config, old.report, old.stock_reason = config, None, None
        return pipe
    adapter = adapter_of(pipe)
    if adapter is None and "Inpaint" in type(pipe).__name__:
        # Inpainting has its own idea of what stays; the user loses nothing but the speed.
        warnings.warn(f"SpecEdit leaves {type(pipe).__name__} as it is: inpainting runs the stock path", stacklevel=2)
        return pipe
    if adapter is None:
        known = ", ".join(a.pipelines for a in adapters())
        raise TypeError(f"install: expected one of {known}, got {type(pipe).__name__}")
    if pipe.transformer is None:
        raise ValueError(f"install: expected a {type(pipe).__name__} with a transformer, got one without")
    stock = type(pipe)
    installation = Installation(config, adapter, stock)
    if (reason := supported(pipe.scheduler) or _unsuited(pipe)) is not None:
        installation.warned.add(reason)  # said now, not again at the call
        warnings.warn(f"SpecEdit will run the stock pipeline: {reason}", stacklevel=2)
    adapter.attach(pipe)
    setattr(pipe, _ATTRIBUTE, installation)
    pipe.__class__ = _accelerated_class(stock)
    return pipe


def _accelerated_class(stock: type) -> type:
    """A subclass of the same name for one instance alone: save_pretrained and isinstance see what they always saw."""
    body = {
        "__call__": _call,
        "__reduce_ex__": _reduce,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (stock,), body)


def _reduce(self, protocol: int) -> tuple:
    """For copy and pickle: nobody can import the class of an installed instance, so its copy gets one of its own."""
    installation = _installation(self)
    return _blank, (installation.stock_class,), vars(self) | {_ATTRIBUTE: copy.copy(installation)}


def _blank(stock: type) -> Any:
    return object.__new__(_accelerated_class(stock))


def uninstall(pipe: Any) -> Any:
    """Take SpecEdit off: class and attention processors are the original objects again. Without it, nothing happens."""
    installation = _installation(pipe)
    if installation is not None:
        pipe.__class__ = installation.stock_class
        delattr(pipe, _ATTRIBUTE)
        if pipe.transformer is not None:  # whoever frees memory takes it away first
            installation.adapter.detach(pipe)
    return pipe


def report(pipe: Any) -> RunReport:
    """What the last accelerated call of an installed pipeline did.

    Raises:
        ValueError: SpecEdit is not installed, no call has been accelerated yet, or the last one ran the stock pipeline.
    """
    installation = _installation(pipe)
    if installation is None:
        raise ValueError(f"report: expected a pipeline with SpecEdit installed, got a plain {type(pipe).__name__}")
    if installation.report is None and (reason := installation.stock_reason) is not None:
        raise ValueError(f"report: expected an accelerated call, but the last one ran the stock pipeline: {reason}")
    if installation.report is None:
        raise ValueError("report: expected at least one accelerated call, got none since install")
    return installation.report


@contextmanager
def disabled(pipe: Any) -> Iterator[Any]:
    """Inside the block the pipeline runs its stock call."""
    installation = _installation(pipe)
    _sleep(installation, +1)
    try:
        yield pipe
    finally:
        _sleep(installation, -1)


def _sleep(installation: Installation | None, change: int) -> None:
    if installation is not None:
        with installation.lock:  # blocks may open and close in several threads
            installation.asleep += change


def is_active(pipe: Any) -> bool:
    """Whether the next call would run SpecEdit's loop (unless its arguments prevent that)."""
    installation = _installation(pipe)
    return installation is not None and not installation.asleep


def last_report(pipe: Any) -> RunReport | None:
    """The report of the last call, or None where it ran stock."""
    installation = _installation(pipe)
    return None if installation is None else installation.report


def _installation(pipe: Any) -> Installation | None:
    return getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)


def _call(self, *args: Any, edit_mask: Any = None, **kwargs: Any) -> Any:
    """The stock pipeline's call, accelerated by SpecEdit. `edit_mask`: PIL image, array or tensor, nonzero = edit."""
    installation = _installation(self)
    stock = installation.stock_class.__call__
    bound = inspect.signature(stock).bind(self, *args, **kwargs)  # a TypeError here is the stock call's own
    if installation.asleep:
        installation.report, installation.stock_reason = None, "SpecEdit was disabled"
        if edit_mask is not None:
            warnings.warn("SpecEdit is disabled here; edit_mask not applied, so any pixel may change", stacklevel=2)
        return stock(self, *args, **kwargs)
    if self.transformer is None:
        raise ValueError(f"expected a {installation.stock_class.__name__} with a transformer, got one without")
    asked_steps = bound.arguments.get("num_inference_steps")
    bound.apply_defaults()
    call = {name: value for name, value in bound.arguments.items() if name != "self"}
    installation.report = None  # a report is of the last call, whatever becomes of it
    reason = supported(self.scheduler) or _unsuited(self) or _own_call(installation.stock_class)
    reason = reason or installation.adapter.refusal(self, call, installation.config.attention)
    installation.stock_reason = reason
    if reason:
        # What the stock pipeline does not know of may be what protects somebody's pixels: said of every such call.
        lost = ["edit_mask"] * (edit_mask is not None) + ["keep_pixels"] * installation.config.keep_pixels
        if lost or reason not in installation.warned:
            installation.warned.add(reason)
            more = f"; {' and '.join(lost)} not applied, so any pixel may change" if lost else ""
            warnings.warn(f"SpecEdit runs the stock pipeline: {reason}{more}", stacklevel=2)
        return stock(self, *args, **kwargs)
    config = installation.config if asked_steps is None else installation.config.with_steps(asked_steps)
    with torch.no_grad():
        return _accelerated(self, installation, config, call, edit_mask)


def _unsuited(pipe: Any) -> str | None:
    if getattr(pipe.transformer, "is_cache_enabled", False) or any(map(_caches, pipe.transformer.modules())):
        return "a diffusers cache is enabled on the transformer, and it would mix up the stages"
    # cache-dit, and the caches that it descends from, mark what they patch. Their blocks need a context that only the
    # stock call opens.
    if getattr(pipe.transformer, "_is_cached", False) or any("cache_dit" in c.__module__ for c in type(pipe).__mro__):
        return "cache-dit is enabled on this pipeline, and its cache would mix up the stages; disable it first"
    if getattr(getattr(pipe.transformer, "_parallel_config", None), "context_parallel_config", None) is not None:
        return "context parallelism splits the sequence over several devices, and SpecEdit's has coarse and fine tokens"
    return None


def _caches(module: torch.nn.Module) -> bool:
    """Whether a diffusers cache hangs on `module`: `apply_*_cache` puts it there without telling the transformer."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    names = [type(hook).__module__.rpartition(".")[-1] for hook in hooks]
    return any(name.endswith("cache") or name == "pyramid_attention_broadcast" for name in names)


def _own_call(stock: type) -> str | None:
    """Why a class whose call is not the library's runs stock: what it does beside or instead would be left out."""
    owner = next(base for base in stock.__mro__ if "__call__" in vars(base))
    if owner.__module__.partition(".")[0] in ("diffusers", __package__):
        return None
    return f"{owner.__qualname__} has a __call__ of its own, and SpecEdit's loop would not run what it adds"


def _accelerated(pipe: Any, installation: Installation, config: SpecEditConfig, call: dict, edit_mask: Any) -> Any:
    began = time.perf_counter()
    adapter = installation.adapter
    needs_draft = config.uses_draft and edit_mask is None
    if needs_draft and config.selector == "semantic":
        check_decoder(pipe.vae)
    adapter.attach(pipe)  # fusing projections or loading an adapter may have replaced processors since install
    try:
        state = adapter.prepare(pipe, call, config.attention)
        warn_if_cropped(state.placement, state.pixels_per_token, installation.warned)
        prepared = sampler.clock(state)
        pipe._num_timesteps = config.nfe
        with pipe.progress_bar(total=config.nfe + (config.draft_steps if needs_draft else 0)) as bar:
            outcome = sampler.run(adapter, pipe, state, config, edit_mask, _Listener(pipe, call, state, bar))
        finished = sampler.clock(state)
        source = state.extra.get("source")
        in_pixels = source is not None and call["output_type"] != "latent"
        if config.keep_pixels and not in_pixels:  # without pixels on both sides, latents are what can be kept
            outcome.tokens = restore.blend_latents(outcome.tokens, state.aligned, outcome.edited, state.grid)
        images = adapter.decode(pipe, state, outcome.tokens, call["output_type"])
        if config.keep_pixels and in_pixels:
            side = 2 * state.pixels_per_token
            images = restore.keep_pixels(images, source, outcome.edited, side, call["output_type"])
        ended = sampler.clock(state)
        outcome.stages.insert(0, sampler.StageReport("encode", None, None, 0, 0, 0.0, prepared - began))
        outcome.stages.append(sampler.StageReport("decode", None, None, 0, 0, 0.0, ended - finished))
        installation.report = _report(pipe, state, config, outcome, ended - began, images, call)
        pipe.maybe_free_model_hooks()
    finally:
        pipe._current_timestep = None
    return (images,) if not call["return_dict"] else adapter.output(images)


class _Listener:
    """Progress bar and the caller's callback."""

    def __init__(self, pipe: Any, call: dict, state: Any, bar: Any):
        self.pipe, self.state, self.bar = pipe, state, bar
        self.callback = call.get("callback_on_step_end")  # not every pipeline has one
        self.names = call.get("callback_on_step_end_tensor_inputs")

    def draft_step(self) -> None:
        self.bar.update()

    def step(self, index: int, sigma: float, latents: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Called after step `index`; returns the callback's full-grid latents and whether they are other ones, a bool
        () on the device, None where it was not shown any. None where it gave none.
        """
        self.bar.update()
        timestep = tell_timestep(self.pipe, self.state, sigma)
        if self.callback is None:
            return None
        positive = self.state.extra["positive"]
        shown = {}
        for name in self.names:
            if name == "latents":
                shown[name] = latents().to(self.state.extra["dtype"])
            else:
                shown[name] = positive["encoder_hidden_states"]
        before = shown.get("latents")
        # A change in place counts as a change too. Whether there is one stays on the device, or every step would wait.
        snapshot = before.clone() if before is not None else None
        answer = self.callback(self.pipe, index, timestep, dict(shown)) or {}
        if not isinstance(answer, Mapping):
            raise TypeError(f"callback_on_step_end: expected a dict or None, got {type(answer).__name__}")
        if (embeds := answer.get("prompt_embeds")) is not None:
            _check_answer("prompt_embeds", embeds, positive["encoder_hidden_states"].shape)
            positive["encoder_hidden_states"] = embeds
        after = answer.get("latents", before)
        if after is None:
            return None
        _check_answer("latents", after, self.state.noise.shape)
        return after, None if snapshot is None else (after.to(snapshot.device) != snapshot).any()


def _check_answer(name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"callback_on_step_end: expected {name} as a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"callback_on_step_end: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")


def _report(pipe, state, config, outcome, seconds: float, images: Any, call: dict) -> RunReport:
    tokens = state.grid.tokens + state.reference_grid.tokens
    mixed = any(stage.name == "mixed" for stage in outcome.stages)
    stock = STOCK_STEPS * forward_flops(pipe, state, tokens, state.branches) * state.batch
    source = state.extra.get("source")
    picture = None
    if source is not None:
        picture = pipe.image_processor.numpy_to_pil(source[:1].permute(0, 2, 3, 1).cpu().numpy())[0]
    return RunReport(
        nfe=sum(s.steps for s in outcome.stages if s.name != "draft"),  # fewer than asked after an interrupt
        draft_steps=next((s.steps for s in outcome.stages if s.name == "draft"), 0),
        stages=outcome.stages,
        flops=sum(s.flops for s in outcome.stages),
        flops_stock=stock,
        seconds=seconds,
        score=None if outcome.score is None else outcome.score.cpu(),
        edit_mask=outcome.edited.cpu() if outcome.looked else None,
        expand_mask=outcome.expanded.cpu() if outcome.looked or mixed else None,
        config=config,
        source=picture,
        edit=images[0] if call["output_type"] == "pil" else None,
        cache_bytes=outcome.cache_bytes,
        missed=outcome.missed,
    )

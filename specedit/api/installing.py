"""Installing SpecEdit on one pipeline instance, and taking it off again."""

from __future__ import annotations

import copyreg
import inspect
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack

import torch

from ..config import STOCK_STEPS, SpecEditConfig, resolve
from ..method import restore, sampler
from ..method.adapter import Adapter, EditState, Run
from ..method.denoise import forward_flops, set_current_timestep
from ..method.schedule import supported
from ..models import adapter_of, adapters
from ..models.attention import mask_support
from ..models.shared.images import check_decoder
from ..once import warn_once
from ..overrides import Overrides
from ..registry import selectors
from ..run_report import RunReport, StageReport
from ..versions import check_diffusers
from . import accelerated, inputs, sharing
from .installation import ATTRIBUTE, CallRecord, Calls, Installation, installation_of
from .sizes import warn_if_cropped

P = TypeVar("P")  # the class of the pipeline


def install(pipe: P, config: str | SpecEditConfig | None = None, **overrides: Unpack[Overrides]) -> P:
    """Make one pipeline instance edit by SpecEdit; the same call then returns the same edit faster.

    Args:
        pipe: a diffusers FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline or
            LongCatImageEditPipeline.
        config: name of a preset (`specedit.presets` has them all; "balanced" if None) or SpecEditConfig.
        overrides: any field of SpecEditConfig.

    Returns:
        `pipe` itself. Installing again replaces the configuration.

    Raises:
        TypeError: a pipeline that is not supported, or an unknown field.
        ValueError: a preset or value that does not exist, or a pipeline that was loaded without its transformer.
        ImportError: a diffusers that is too old.
    """
    check_diffusers()
    _install(pipe, resolve(config, **overrides))
    return pipe


def _install(pipe: Any, config: SpecEditConfig) -> None:
    if (old := installation_of(pipe)) is not None and _in_place(pipe):
        old.calls = Calls()  # the reports were another configuration's
        old.config = config
        return
    adapter = adapter_of(pipe)
    if adapter is None and "Inpaint" in type(pipe).__name__:
        # Inpainting has its own idea of what stays; the user loses nothing but the speed.
        warnings.warn(f"SpecEdit leaves {type(pipe).__name__} as it is: inpainting runs the stock path", stacklevel=3)
        return
    if adapter is None:
        raise TypeError(_not_supported(pipe))
    if pipe.transformer is None:
        raise ValueError(f"install: expected a {type(pipe).__name__} with a transformer, got one without")
    uninstall(pipe)  # what an installation that was interrupted left
    stock = type(pipe)
    installation = Installation(config, adapter, stock)
    if (reason := supported(pipe.scheduler) or _conflicting_feature(pipe)) is not None:
        installation.warned.add(reason)  # said now, not again at the call
        warnings.warn(f"SpecEdit will run the stock pipeline: {reason}", stacklevel=3)
    try:
        setattr(pipe, ATTRIBUTE, installation)
        sharing.attach(pipe, installation)
        pipe.__class__ = _accelerated_class(stock)  # last: until here every call is the stock one
    except BaseException:
        uninstall(pipe)
        raise


def _not_supported(pipe: Any) -> str:
    known = [adapter.pipelines for adapter in adapters()]
    name, bases = type(pipe).__name__, [base.__name__ for base in type(pipe).__mro__]
    one_of = f"one of {', '.join(known)}"
    if "ModularPipeline" not in bases:
        return f"install: expected {one_of}, got {name}"
    plain = [base.replace("ModularPipeline", "Pipeline") for base in bases]
    instead = next((one for one in plain if one in known), one_of)
    return f"install: modular pipelines cannot be accelerated yet: expected {instead}, got {name}"


def _accelerated_class(stock: type) -> type:
    return accelerated.subclass(stock, _call, __reduce_ex__=_reduce, __setstate__=_set_state)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """For copy and pickle: nobody can import the class of an installed instance, so its copy gets one of its own."""
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
        sharing.attach(self, installation)  # the copy counts beside the original, on the same transformer or its own


def uninstall(pipe: P) -> P:
    """Take SpecEdit off: class and attention processors are the original objects again. Without it, nothing happens.

    On a transformer that other installed pipelines share, the processors stay until the last of them is uninstalled;
    while a call is running, until it ends. They act as the stock ones in stock calls.
    """
    with sharing.LOCK:
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


@contextmanager
def disabled(pipe: P) -> Iterator[P]:
    """Inside the block the pipeline runs its stock call, in this thread alone."""
    installation = installation_of(pipe)
    if installation is None:
        yield pipe
        return
    with installation.switch.turned_off():
        yield pipe


def is_active(pipe: Any) -> bool:
    """Whether this thread's next call would run SpecEdit's loop (unless its arguments prevent that)."""
    installation = installation_of(pipe)
    return installation is not None and _in_place(pipe) and not installation.switch.off


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


def _call(
    self: Any,
    installation: Installation,
    record: CallRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    edit_mask: Any,
) -> Any:
    """The stock pipeline's call, accelerated by SpecEdit, or left to stock with a warning that says why."""
    stock = installation.stock_class.__call__
    try:
        bound = inspect.signature(stock).bind(self, *args, **kwargs)
    except TypeError:
        return stock(self, *args, **kwargs)  # raises its own error
    if installation.switch.off:
        record.stock_reason = "SpecEdit was disabled"
        if edit_mask is not None:
            warnings.warn("SpecEdit is disabled here; edit_mask not applied, so any pixel may change", stacklevel=3)
        return stock(self, *args, **kwargs)
    if self.transformer is None:
        raise ValueError(f"expected a {installation.stock_class.__name__} with a transformer, got one without")
    asked_steps = bound.arguments.get("num_inference_steps")
    bound.apply_defaults()
    call = {name: value for name, value in bound.arguments.items() if name != "self"}
    reason = supported(self.scheduler) or _conflicting_feature(self) or _overridden_call(installation.stock_class)
    reason = reason or installation.adapter.refusal(self, call, installation.config.attention)
    record.stock_reason = reason
    if reason:
        # What the stock pipeline does not know of may be what protects somebody's pixels: said of every such call.
        lost = ["edit_mask"] * (edit_mask is not None) + ["keep_pixels"] * installation.config.keep_pixels
        if lost or reason not in installation.warned:
            installation.warned.add(reason)
            more = f"; {' and '.join(lost)} not applied, so any pixel may change" if lost else ""
            warnings.warn(f"SpecEdit runs the stock pipeline: {reason}{more}", stacklevel=3)
        return stock(self, *args, **kwargs)
    config = installation.config if asked_steps is None else installation.config.with_steps(asked_steps)
    if config.forecast != (forecast := installation.config.forecast):
        text = f"num_inference_steps={asked_steps} leaves no stage long enough for forecast={forecast!r}"
        warn_once(self, f"{text}; SpecEdit runs without it", f"too few steps for {forecast}")
    # Fusing projections or loading an adapter may have replaced processors since install: they come back here.
    with torch.no_grad(), sharing.running(self, installation):
        return _accelerated(self, installation.adapter, record, config, call, edit_mask)


def _conflicting_feature(pipe: Any) -> str | None:
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


def _overridden_call(stock: type) -> str | None:
    """Why a class whose call is not the library's runs stock: what it does beside or instead would be left out."""
    own = [base for base in stock.__mro__ if "__call__" in vars(base) and not accelerated.is_ours(base)]
    # A library that undoes its patch of a class leaves there what the class had inherited.
    owner = [base for base in own if vars(base)["__call__"] is vars(own[0])["__call__"]][-1]
    if owner.__module__.partition(".")[0] in ("diffusers", __package__):
        return None
    return f"{owner.__qualname__} has a __call__ of its own, and SpecEdit's loop would not run what it adds"


def _accelerated(
    pipe: Any, adapter: Adapter, record: CallRecord, config: SpecEditConfig, call: dict[str, Any], edit_mask: Any
) -> Any:
    began = time.perf_counter()
    edit_mask = inputs.check(call, edit_mask)
    needs_draft = config.uses_draft and edit_mask is None
    if needs_draft and selectors[config.selector].needs_decoder == "features":
        check_decoder(pipe.vae)
    mask_support.check(pipe.transformer, config)
    try:
        state = adapter.prepare(pipe, call, config)
        warn_if_cropped(pipe, state.placement, state.pixels_per_token)
        prepared = sampler.clock(state)
        pipe._num_timesteps = config.nfe
        with pipe.progress_bar(total=config.nfe + (config.draft_steps if needs_draft else 0)) as bar:
            outcome = sampler.edit(Run(adapter, pipe, config, state), edit_mask, _Listener(pipe, call, state, bar))
        finished = sampler.clock(state)
        source = state.conditioning.source
        in_pixels = source is not None and call["output_type"] != "latent"
        if config.keep_pixels and not in_pixels:  # without pixels on both sides, latents are what can be kept
            outcome.tokens = restore.blend_latents(outcome.tokens, state.aligned, outcome.edited, state.grid)
        images = adapter.decode(pipe, state, outcome.tokens, call["output_type"])
        if config.keep_pixels and source is not None and in_pixels:
            side = 2 * state.pixels_per_token
            images = restore.keep_pixels(images, source, outcome.edited, side, call["output_type"])
        ended = sampler.clock(state)
        outcome.stages.insert(0, StageReport("encode", None, None, 0, 0, 0.0, prepared - began))
        outcome.stages.append(StageReport("decode", None, None, 0, 0, 0.0, ended - finished))
        record.report = _report(pipe, state, config, outcome, ended - began, images, call)
        pipe.maybe_free_model_hooks()
    finally:
        pipe._current_timestep = None
    return (images,) if not call["return_dict"] else adapter.output(images)


class _Listener:
    """Progress bar and the caller's callback."""

    def __init__(self, pipe: Any, call: dict[str, Any], state: Any, bar: Any):
        self.pipe, self.state, self.bar = pipe, state, bar
        self.callback = call.get("callback_on_step_end")  # not every pipeline has one
        self.names = call.get("callback_on_step_end_tensor_inputs") or []

    def draft_step(self) -> None:
        self.bar.update()

    def step(self, index: int, sigma: float, latents: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Called after step `index`; returns the callback's full-grid latents and whether they are other ones, a bool
        () on the device, None where it was not shown any. None where it gave none.
        """
        self.bar.update()
        timestep = set_current_timestep(self.pipe, self.state, sigma)
        if self.callback is None:
            return None
        conditioning = self.state.conditioning
        shown = {}
        for name in self.names:
            if name == "latents":
                shown[name] = latents().to(conditioning.dtype)
            else:
                shown[name] = conditioning.prompt_embeds
        before = shown.get("latents")
        # A change in place counts as a change too. Whether there is one stays on the device, or every step would wait.
        snapshot = before.clone() if before is not None else None
        answer = self.callback(self.pipe, index, timestep, dict(shown)) or {}
        if not isinstance(answer, Mapping):
            raise TypeError(f"callback_on_step_end: expected a dict or None, got {type(answer).__name__}")
        if (embeds := answer.get("prompt_embeds")) is not None:
            _check_answer("prompt_embeds", embeds, conditioning.prompt_embeds.shape)
            conditioning.prompt_embeds = embeds
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


def _report(
    pipe: Any,
    state: EditState,
    config: SpecEditConfig,
    outcome: sampler.Outcome,
    seconds: float,
    images: Any,
    call: dict[str, Any],
) -> RunReport:
    tokens = state.grid.tokens + state.reference_grid.tokens
    mixed = any(stage.name == "mixed" for stage in outcome.stages)
    stock_steps = _stock_steps(pipe, call)
    stock = stock_steps * forward_flops(pipe, state, tokens, state.branches) * state.batch
    source = state.conditioning.source
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
        edit_mask=outcome.edited.cpu() if outcome.has_edit_mask else None,
        expand_mask=outcome.expanded.cpu() if outcome.has_edit_mask or mixed else None,
        config=config,
        source=picture,
        edit=images[0] if call["output_type"] == "pil" else None,
        cache_bytes=outcome.cache_bytes,
        empty_drafts=outcome.empty_drafts,
        stock_steps=stock_steps,
        overflowed=outcome.overflowed,
    )


def _stock_steps(pipe: Any, call: dict[str, Any]) -> int:
    """Steps that the stock pipeline would take: what the caller gave, else the call's own default."""
    if (asked := call.get("num_inference_steps")) is not None:
        return int(asked)
    for base in type(pipe).__mro__:
        parameters = inspect.signature(base.__call__).parameters if "__call__" in vars(base) else {}
        if "num_inference_steps" in parameters:
            return int(parameters["num_inference_steps"].default)
    return STOCK_STEPS

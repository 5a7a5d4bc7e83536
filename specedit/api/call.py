"""One call of an installed pipeline: left to stock where it must be, else run by the sampler, and reported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specedit_kernels import check_backend

from ..choices import backend_of
from ..config import SpecEditConfig
from ..method import haze, restore, sampler
from ..method.adapter import Run
from ..method.callback import StepCallback
from ..method.timesteps import modulated
from ..method.trace import Trace
from ..models.attention import mask_support
from ..models.shared.devices import execution_device
from ..models.shared.images import check_decoder
from ..once import warn_caller, warn_once
from . import inputs, sharing
from .encodings import RENDITIONS, Reuse
from .installation import CallRecord, Installation
from .reporting import report_of
from .sizes import warn_if_cropped
from .stock import warn_of_stock, why_stock_call


def call(
    pipe: Any,
    installation: Installation,
    record: CallRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    edit_mask: Any,
) -> Any:
    """The stock pipeline's call, accelerated by SpecEdit, or left to stock with a warning that says why."""
    stock = installation.stock_class.__call__
    signature = inspect.signature(stock)
    try:
        bound = signature.bind(pipe, *args, **kwargs)
    except TypeError:
        return stock(pipe, *args, **kwargs)  # raises its own error
    if installation.disabled.inside:
        record.stock_reason = "SpecEdit was disabled"
        if edit_mask is not None:
            warn_caller("SpecEdit is disabled here; edit_mask not applied, so any pixel may change")
        return stock(pipe, *args, **kwargs)
    if pipe.transformer is None:
        raise ValueError(f"expected a {installation.stock_class.__name__} with a transformer, got one without")
    asked_steps = None if installation.keeps_steps else bound.arguments.get("num_inference_steps")
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
    inputs.check_types(arguments, [name for name, one in signature.parameters.items() if one.default is None])
    record.stock_reason = why_stock_call(pipe, installation, arguments)
    if record.stock_reason:
        warn_of_stock(installation, record.stock_reason, edit_mask)
        return stock(pipe, *args, **kwargs)
    if installation.config.method_options is None:  # other methods choose their own number of steps
        asked_steps = installation.adapter.asked_steps(pipe, asked_steps)
    config = configured(pipe, installation, arguments, asked_steps, edit_mask)
    if config.forecast is None and (forecast := installation.config.forecast) is not None:
        text = f"num_inference_steps={asked_steps} leaves no stage long enough for forecast={forecast!r}"
        warn_once(pipe, f"{text}; SpecEdit runs without it", f"too few steps for {forecast}")
    # Fusing projections or loading an adapter may have replaced processors since install: they come back here.
    with torch.no_grad(), sharing.running(pipe, installation), reusing(pipe, installation) as reuse:
        return accelerated_call(pipe, installation, record, config, arguments, edit_mask, reuse)


def configured(
    pipe: Any, installation: Installation, arguments: dict[str, Any], asked_steps: int | None, edit_mask: Any
) -> SpecEditConfig:
    """The installed configuration with the steps that a call takes. asked_steps: what it asks for, or None."""
    config, adapter = installation.config, installation.adapter
    masked = edit_mask is not None or adapter.own_mask(pipe, arguments) is not None
    if asked_steps is not None:
        config = config.with_steps(asked_steps, masked=masked)
        if config.nfe > asked_steps:
            text = f"num_inference_steps={asked_steps} leaves no step to find with what is edited, as draft_steps=0"
            warn_once(pipe, f"{text}; SpecEdit takes {config.nfe}", "too few steps without a draft")
    return config.with_strength(adapter.strength(arguments))


@contextmanager
def reusing(pipe: Any, installation: Installation) -> Iterator[Reuse | None]:
    """A call's view of what the pipeline has kept; None where it reuses nothing."""
    if not (installation.config.reuse_encodings or installation.session.inside):
        yield None
        return
    with installation.encodings.reusing(pipe) as reuse:
        if reuse is None:
            cause = "changes of some weights cannot be seen, as of those made in inference mode"
            warn_once(pipe, f"reuse_encodings has no effect: {cause}")
        yield reuse


def _device(pipe: Any) -> torch.device:
    """Where the transformer runs: where its weights are, unless they are offloaded."""
    first: Tensor | None = next(pipe.transformer.parameters(), None)
    return first.device if first is not None and first.device.type == "cuda" else execution_device(pipe)


def accelerated_call(
    pipe: Any, installation: Installation, record: CallRecord, config: Any, arguments: dict[str, Any], edit_mask: Any,
    reuse: Reuse | None,
) -> Any:  # fmt: skip
    """The edit, as the stock pipeline returns it. Its report goes into the record."""
    trace, adapter = Trace(pipe), installation.adapter
    began = trace.clock()
    try:
        with trace.timed("encode"):
            mask = inputs.mask_of(adapter, pipe, arguments, edit_mask, config)
            edit_mask = inputs.check(arguments, mask, config, "edit_mask" if mask is edit_mask else "mask_image")
            check_backend(backend_of(config.attention), _device(pipe))
            drafted = config.uses_draft and edit_mask is None
            if config.needs_decoder(masked=edit_mask is not None) == "features":
                check_decoder(pipe.vae)
            mask_support.check(pipe.transformer, config, coarse=adapter.fixed_prefix)
            state = adapter.prepare(pipe, arguments, config)
            if reuse is not None:
                reuse.pictures = False  # what a run encodes later depends on its seed
            trace.device = state.device
            warn_if_cropped(pipe, state.placement, state.pixels_per_token)
        if (function := arguments.get("callback_on_step_end")) is not None:  # not every pipeline has one
            trace.callback = StepCallback(function, arguments["callback_on_step_end_tensor_inputs"])
        run = Run(adapter, pipe, config, state, trace)
        pipe._num_timesteps = config.nfe
        with known_finding(run, reuse if drafted else None, arguments) as known:
            drafts = drafted and not known
            with pipe.progress_bar(total=config.nfe + (config.draft_steps if drafts else 0)) as trace.bar:
                method = config.method_options
                with modulated(run, drafts):
                    outcome = (sampler if method is None else method).edit(run, edit_mask)
        if config.keep_pixels and not outcome.has_edit_mask:
            warn_caller(
                "keep_pixels not applied, so any pixel may change: without edit_mask nothing says what is edited"
            )
        with trace.timed("decode"):
            clears = installation.session.inside and config.keep_pixels
            images = decoded(run, outcome, arguments["output_type"], reuse, clears)
        seconds = trace.clock() - began
        record.report = report_of(run, outcome, images, arguments, seconds, {} if reuse is None else reuse.counts)
        if installation.keeps_steps:
            record.report.overruled_steps = arguments.get("num_inference_steps")
        pipe.maybe_free_model_hooks()
    finally:
        pipe._current_timestep = None
    return (images,) if not arguments["return_dict"] else adapter.output(images)


@contextmanager
def known_finding(run: Run, reuse: Reuse | None, arguments: dict[str, Any]) -> Iterator[bool]:
    """Give a run the finding of an earlier draft, where there is one, or keep its own. Whether there is one.

    A finding is kept if every sample's draft has shown a change and no score overflowed: another seed's draft may show
    more.
    """
    if reuse is None:
        yield False
        return
    key = reuse.finding_key(arguments, run.config, run.state.conditioning.prompt_embeds)
    run.finding = reuse.finding(key)
    known = run.finding is not None
    yield known
    if key is None or known or run.finding is None:
        return
    score, detected = run.finding
    if not sampler.count_empty(detected) and (score is None or bool(score.isfinite().all())):
        reuse.kept.put(key, run.finding)


def decoded(
    run: Run, outcome: sampler.Outcome, output_type: str, reuse: Reuse | None = None, clears: bool = False
) -> Any:
    """The images of a run. `keep_pixels` puts the source back outside the edited cells.

    clears: and within them where nothing but the autoencoder has changed it. Only of output_type="pil".
    """
    state, source, edited = run.state, run.state.conditioning.source, outcome.cells.detected
    keeps, tokens = run.config.keep_pixels, run.adapter.finish(state, outcome.tokens)
    if output_type == "latent":
        source = None
    if keeps and source is None:  # without pixels on both sides, latents are what can be kept
        tokens = restore.blend_latents(tokens, state.aligned, edited, state.grid)
    if source is not None and run.config.decode == "edited":
        images, run.trace.decoded = run.adapter.decode_edited(run.pipe, state, tokens, output_type, edited)
    else:
        images = run.adapter.decode(run.pipe, state, tokens, output_type)
    if keeps and source is not None:
        cell, changed = 2 * state.pixels_per_token, None
        if clears and output_type == "pil":
            changed = haze.changed(images, rendition(run, reuse), restore.shown(edited, cell, source) > 0)
        images = restore.keep_pixels(images, source, edited, cell, output_type, changed)
    return images


def rendition(run: Run, reuse: Reuse | None) -> Tensor:
    """What the decoder makes of the picture being edited (B, 3, H, W), in 0..1."""
    latents = run.state.aligned

    def decode() -> Tensor:
        images: Tensor = run.adapter.decode(run.pipe, run.state, latents, "pt")
        return images

    if reuse is None:
        return decode()
    images: Tensor = reuse.encode(RENDITIONS, decode, {"latents": latents}, run.state.device)
    return images

"""One call of an installed pipeline: left to stock where it must be, else run by the sampler, and reported."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..method import offered, restore, sampler
from ..method.adapter import Run
from ..method.callback import StepCallback
from ..method.trace import Trace
from ..models.attention import mask_support
from ..models.shared.images import check_decoder
from ..once import warn_caller, warn_once
from . import inputs, sharing
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
    try:
        bound = inspect.signature(stock).bind(pipe, *args, **kwargs)
    except TypeError:
        return stock(pipe, *args, **kwargs)  # raises its own error
    if installation.switch.off:
        record.stock_reason = "SpecEdit was disabled"
        if edit_mask is not None:
            warn_caller("SpecEdit is disabled here; edit_mask not applied, so any pixel may change")
        return stock(pipe, *args, **kwargs)
    if pipe.transformer is None:
        raise ValueError(f"expected a {installation.stock_class.__name__} with a transformer, got one without")
    asked_steps = bound.arguments.get("num_inference_steps")
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
    record.stock_reason = why_stock_call(pipe, installation, arguments)
    if record.stock_reason:
        warn_of_stock(installation, record.stock_reason, edit_mask)
        return stock(pipe, *args, **kwargs)
    config = installation.config if asked_steps is None else installation.config.with_steps(asked_steps)
    if config.forecast is None and (forecast := installation.config.forecast) is not None:
        text = f"num_inference_steps={asked_steps} leaves no stage long enough for forecast={forecast!r}"
        warn_once(pipe, f"{text}; SpecEdit runs without it", f"too few steps for {forecast}")
    # Fusing projections or loading an adapter may have replaced processors since install: they come back here.
    with torch.no_grad(), sharing.running(pipe, installation):
        return accelerated_call(pipe, installation, record, config, arguments, edit_mask)


def accelerated_call(
    pipe: Any, installation: Installation, record: CallRecord, config: Any, arguments: dict[str, Any], edit_mask: Any
) -> Any:
    """The edit, as the stock pipeline returns it. Its report goes into the record."""
    trace, adapter = Trace(pipe), installation.adapter
    began = trace.clock()
    try:
        with trace.timed("encode"):
            edit_mask = inputs.check(arguments, edit_mask, config)
            offered.check(adapter, config)
            drafted = config.uses_draft and edit_mask is None
            if config.needs_decoder(masked=edit_mask is not None) == "features":
                check_decoder(pipe.vae)
            mask_support.check(pipe.transformer, config)
            state = adapter.prepare(pipe, arguments, config)
            trace.device = state.device
            warn_if_cropped(pipe, state.placement, state.pixels_per_token)
        if (function := arguments.get("callback_on_step_end")) is not None:  # not every pipeline has one
            trace.callback = StepCallback(function, arguments["callback_on_step_end_tensor_inputs"])
        run = Run(adapter, pipe, config, state, trace)
        pipe._num_timesteps = config.nfe
        with pipe.progress_bar(total=config.nfe + (config.draft_steps if drafted else 0)) as trace.bar:
            method = config.method_options
            outcome = (sampler if method is None else method).edit(run, edit_mask)
        if config.keep_pixels and not outcome.has_edit_mask:
            warn_caller(
                "keep_pixels not applied, so any pixel may change: without edit_mask nothing says what is edited"
            )
        with trace.timed("decode"):
            images = decoded(run, outcome, arguments["output_type"])
        record.report = report_of(run, outcome, images, arguments, trace.clock() - began)
        pipe.maybe_free_model_hooks()
    finally:
        pipe._current_timestep = None
    return (images,) if not arguments["return_dict"] else adapter.output(images)


def decoded(run: Run, outcome: sampler.Outcome, output_type: str) -> Any:
    """The images of a run. `keep_pixels` puts the source back outside the edited cells."""
    state, source, edited = run.state, run.state.conditioning.source, outcome.cells.detected
    keeps, tokens = run.config.keep_pixels, outcome.tokens
    if output_type == "latent":
        source = None
    if keeps and source is None:  # without pixels on both sides, latents are what can be kept
        tokens = restore.blend_latents(tokens, state.aligned, edited, state.grid)
    if source is not None and run.config.decode == "edited":
        images, run.trace.decoded = run.adapter.decode_edited(run.pipe, state, tokens, output_type, edited)
    else:
        images = run.adapter.decode(run.pipe, state, tokens, output_type)
    if keeps and source is not None:
        images = restore.keep_pixels(images, source, edited, 2 * state.pixels_per_token, output_type)
    return images

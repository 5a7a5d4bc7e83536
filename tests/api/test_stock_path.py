"""Calls that run the stock pipeline instead, and the one warning that says why."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxKontextPipeline,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import specedit
from specedit.api.stock import _conflicting_feature
from tests.api.common import CORNER, QUICK, processors

PYRAMID = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
    current_timestep_callback=lambda: 500,
)  # fmt: skip


def stock_path(pipe, call):
    """Calls twice: the stock pipeline's own result both times, and one warning that points here. Returns its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [call(pipe), call(pipe)]
    caught = [w for w in caught if "SpecEdit" in str(w.message)]
    specedit.uninstall(pipe)
    stock = call(pipe)
    assert torch.equal(images[0], stock) and torch.equal(images[1], stock)
    assert [w.category for w in caught] == [UserWarning]
    return str(caught[0].message)


def test_text_to_image(pipe, edit):
    specedit.install(pipe)
    text = stock_path(pipe, lambda p: edit(p, image=None, num_inference_steps=2))
    assert text == "SpecEdit runs the stock pipeline: there is no image to edit"


@pytest.mark.parametrize(
    ("changes", "given", "lost"),
    [
        ({}, {"edit_mask": CORNER}, "edit_mask"),
        ({"keep_pixels": True}, {}, "keep_pixels"),
        ({"keep_pixels": True}, {"edit_mask": CORNER}, "edit_mask and keep_pixels"),
    ],
)
def test_stock_fallback_warns_when_edit_mask_is_lost(pipe, edit, changes, given, lost):
    specedit.install(pipe, **changes)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"sigmas were given.*; {lost} not applied, so any pixel may change"):
            edit(pipe, sigmas=[1.0, 0.5], **given)


class Silent:
    """Attention that says nothing."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return (
            (0 * hidden_states, 0 * encoder_hidden_states) if encoder_hidden_states is not None else 0 * hidden_states
        )


@pytest.mark.slow
def test_third_party_processors_run_stock(make_pipe, edit):
    pipe = make_pipe()
    kept = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(Silent())
    try:
        specedit.install(pipe)
        text = stock_path(pipe, lambda p: edit(p, num_inference_steps=2))
        assert "its attention processor Silent is none of diffusers' own" in text
        specedit.install(pipe, **QUICK, attention="stock")
        edit(pipe)
        assert specedit.report(pipe).nfe == 3
    finally:
        specedit.uninstall(pipe)
        pipe.transformer.set_attn_processor(kept)


def test_context_parallelism(make_pipe, edit):
    pipe = make_pipe()
    kept = pipe.transformer._parallel_config
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    try:
        assert "context parallelism splits the sequence" in _conflicting_feature(pipe)
    finally:
        pipe.transformer._parallel_config = kept
    assert _conflicting_feature(pipe) is None


def test_sigmas(pipe, edit):
    specedit.install(pipe)
    assert "sigmas were given" in stock_path(pipe, lambda p: edit(p, sigmas=[1.0, 0.5]))


def test_the_warning_points_to_the_call(pipe, edit, picture):
    specedit.install(pipe)
    size = dict(height=64, width=64, max_area=64 * 64, max_sequence_length=16, num_inference_steps=1)
    with pytest.warns(UserWarning, match="no image to edit") as caught:
        pipe(prompt="a", output_type="latent", **size)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True), "stochastic_sampling"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, invert_sigmas=True), "invert_sigmas"),
    ],
    ids=["stochastic", "inverted"],
)
def test_schedulers_that_are_not_plain(make_pipe, edit, scheduler, word):
    pipe = make_pipe(scheduler=scheduler)
    with pytest.warns(UserWarning, match=f"will run the stock pipeline: the scheduler sets {word}") as caught:
        specedit.install(pipe)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once, at install
        torch.manual_seed(0)
        ours = edit(pipe, num_inference_steps=2)
    specedit.uninstall(pipe)
    torch.manual_seed(0)
    assert torch.equal(edit(pipe, num_inference_steps=2), ours)


def test_a_scheduler_swapped_after_install(pipe, edit):
    specedit.install(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, invert_sigmas=True)
    assert "invert_sigmas" in stock_path(pipe, lambda p: edit(p, num_inference_steps=2))


def test_heun_runs_stock(make_pipe, edit):
    pipe = make_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(Exception) as stock:  # this pipeline passes sigmas, which Heun does not take
        edit(pipe, num_inference_steps=2)
    with pytest.warns(UserWarning, match="the scheduler is FlowMatchHeunDiscreteScheduler"):
        specedit.install(pipe)
    with pytest.raises(type(stock.value)) as ours:
        edit(pipe, num_inference_steps=2)
    assert str(ours.value) == str(stock.value)


def give_ip_adapter(pipe):
    """What loading an IP-Adapter leaves on a pipeline, with random weights."""
    torch.manual_seed(0)
    transformer = pipe.transformer
    parts = {
        name: type(processor)()
        if name.startswith("single")
        else FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(2,))
        for name, processor in transformer.attn_processors.items()
    }
    transformer.set_attn_processor(parts)
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 32, 2)]).eval()


@pytest.mark.parametrize("first", ["install", "adapter"])
def test_ip_adapter(pipe, edit, first):
    if first == "install":
        specedit.install(pipe)
    give_ip_adapter(pipe)
    if first == "adapter":
        specedit.install(pipe)
    embeds = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    arguments = dict(ip_adapter_image_embeds=[embeds], negative_ip_adapter_image_embeds=[embeds])
    text = stock_path(pipe, lambda p: edit(p, num_inference_steps=2, **arguments))
    assert "ip_adapter_image_embeds needs the stock attention processors" in text
    assert sum(isinstance(p, FluxIPAdapterAttnProcessor) for p in processors(pipe)) == 1


@pytest.fixture
def cached():
    """Enables a diffusers cache on a pipeline, and disables it in the end."""
    pipes = []

    def enable(pipe):
        pipes.append(pipe)
        pipe.transformer.enable_cache(PYRAMID)

    yield enable
    for pipe in pipes:
        pipe.transformer.disable_cache()


def apply_pyramid(transformer):
    apply_pyramid_attention_broadcast(transformer, PYRAMID)


def apply_first_block(transformer):
    apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=0.1))


@pytest.mark.parametrize("apply", [apply_pyramid, apply_first_block])
def test_a_diffusers_cache_that_the_transformer_does_not_know_of(make_pipe, apply):
    pipe = make_pipe()
    assert _conflicting_feature(pipe) is None
    apply(pipe.transformer)
    assert not pipe.transformer.is_cache_enabled
    with pytest.warns(UserWarning, match="will run the stock pipeline: a diffusers cache is enabled"):
        specedit.install(pipe)


def test_layerwise_casting_is_no_cache(make_pipe):
    pipe = make_pipe()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
    assert _conflicting_feature(pipe) is None


def test_a_diffusers_cache_enabled_before(pipe, edit, cached):
    cached(pipe)
    with pytest.warns(UserWarning, match="will run the stock pipeline: a diffusers cache is enabled") as caught:
        specedit.install(pipe)
    assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = edit(pipe, num_inference_steps=2)
    pipe.transformer.disable_cache()
    specedit.uninstall(pipe)
    cached(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), ours)


@pytest.mark.slow
def test_a_diffusers_cache_enabled_after(pipe, edit, cached):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    cached(pipe)
    with pytest.warns(UserWarning, match="runs the stock pipeline: a diffusers cache is enabled"):
        edit(pipe, num_inference_steps=1)
    pipe.transformer.disable_cache()
    assert torch.equal(edit(pipe), expected)


def give_cache_dit(pipe):
    """What cache-dit leaves: marks on the pipeline's class and the transformer, whose blocks need an open context."""

    def forward(*args, **kwargs):
        if not pipe.opened:
            raise RuntimeError("no cache context")
        return stock_forward(*args, **kwargs)

    def call(self, *args, **kwargs):
        self.opened = True
        try:
            return stock_call(self, *args, **kwargs)
        finally:
            self.opened = False

    stock_forward, stock_call, pipe.opened = pipe.transformer.forward, type(pipe).__call__, False
    pipe.transformer.forward, pipe.transformer._is_cached = forward, True
    type(pipe).__call__ = functools.wraps(stock_call)(call)


@pytest.mark.parametrize("first", ["install", "cache-dit"])
def test_cache_dit(make_pipe, edit, first):
    class Cached(FluxKontextPipeline):
        """A class of its own, because cache-dit changes that of the pipeline."""

    pipe = make_pipe(Cached)
    if first == "install":
        specedit.install(pipe, **QUICK)
    give_cache_dit(pipe)
    if first == "cache-dit":
        with pytest.warns(UserWarning, match="will run the stock pipeline: cache-dit is enabled") as caught:
            specedit.install(pipe, **QUICK)
        assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        ours = [edit(pipe, num_inference_steps=2) for _ in range(2)]
    assert len([w for w in caught if "cache-dit is enabled" in str(w.message)]) == (first == "install")
    stock = edit(make_pipe(), num_inference_steps=2)
    assert torch.equal(ours[0], stock) and torch.equal(ours[1], stock)
    with pytest.raises(ValueError, match="the last one ran the stock pipeline: cache-dit is enabled"):
        specedit.report(pipe)


class Passes(FluxKontextPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Names(FluxKontextPipeline):
    def __call__(self, image, prompt, **kwargs):
        return super().__call__(image=image, prompt=prompt, **kwargs)


class Wraps(FluxKontextPipeline):
    @functools.wraps(FluxKontextPipeline.__call__)
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Inherits(Wraps):
    pass


@pytest.mark.parametrize("kind", [Passes, Names, Wraps, Inherits])
def test_an_overridden_call_runs_stock(make_pipe, edit, kind):
    """It may check or watermark what comes out, which SpecEdit's loop would not."""
    pipe = specedit.install(make_pipe(kind), **QUICK)
    warned = stock_path(pipe, lambda p: edit(p, num_inference_steps=2))
    assert f"{'Wraps' if kind is Inherits else kind.__name__} has a __call__ of its own" in warned


def test_inpaint_pipelines_stay_stock_with_one_warning(pipe):
    from diffusers import FluxInpaintPipeline

    pipe = FluxInpaintPipeline(**pipe.components)
    before = dict(vars(pipe))
    with pytest.warns(UserWarning, match="FluxInpaintPipeline.*stock path") as caught:
        assert specedit.install(pipe, "turbo") is pipe
    assert len(caught) == 1 and type(pipe) is FluxInpaintPipeline and dict(vars(pipe)).keys() == before.keys()
    specedit.uninstall(pipe)


@pytest.mark.slow
def test_a_stock_call_leaves_no_old_report(pipe, edit):
    specedit.install(pipe, **QUICK)
    edit(pipe)
    assert specedit.report(pipe).nfe == 3
    with pytest.warns(UserWarning, match="sigmas"):
        edit(pipe, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"report: expected an accelerated call, but the last one ran .*: sigmas were"):
        specedit.report(pipe)
    edit(pipe)
    assert specedit.report(pipe).nfe == 3

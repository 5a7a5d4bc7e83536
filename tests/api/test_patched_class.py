"""cache-dit before, after and around SpecEdit: it patches the pipeline's class and writes the old call back."""

import functools
import warnings

import pytest
import torch
from diffusers import FluxKontextPipeline

import specedit
from specedit.api.installing import is_active
from tests.api.common import QUICK


def enable(pipe):
    """What cache-dit's `enable_cache` does: the class's call opens a context that the transformer needs."""
    cls, transformer, opened = type(pipe), pipe.transformer, []
    original_call, original_forward = cls.__call__, transformer.forward

    @functools.wraps(original_call)
    def new_call(self, *args, **kwargs):
        opened.append(1)
        try:
            return original_call(self, *args, **kwargs)
        finally:
            opened.pop()

    def new_forward(*args, **kwargs):
        if not opened:
            raise RuntimeError("no cache context")
        return original_forward(*args, **kwargs)

    pipe._context_manager = object()
    cls.__call__, cls._original_call, cls._is_cached = new_call, original_call, True
    transformer.forward, transformer._original_forward, transformer._is_cached = new_forward, original_forward, True


def disable(pipe):
    """What its `disable_cache` does."""
    transformer = pipe.transformer
    if hasattr(transformer, "_original_forward"):
        transformer.forward = transformer._original_forward
        del transformer._original_forward
    if hasattr(transformer, "_is_cached"):
        del transformer._is_cached
    if hasattr(pipe, "_original_call"):
        type(pipe).__call__ = type(pipe)._original_call
        del type(pipe)._original_call
    if hasattr(pipe, "_context_manager"):
        del pipe._context_manager
    if hasattr(pipe, "_is_cached"):
        del type(pipe)._is_cached


@pytest.fixture
def own(make_pipe):
    """A pipeline whose class is its own, because cache-dit changes it, and the class's attributes."""

    class Cached(FluxKontextPipeline):
        pass

    return make_pipe(Cached)


@pytest.fixture
def stock(make_pipe, edit):
    return edit(make_pipe(), num_inference_steps=2)


@pytest.fixture
def accelerated(make_pipe, edit):
    return edit(specedit.install(make_pipe(), **QUICK))


def install_quietly(pipe):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpecEdit will run the stock pipeline: cache-dit")
        return specedit.install(pipe, **QUICK)


def runs_stock(pipe, edit, stock):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpecEdit runs the stock pipeline: cache-dit")
        return torch.equal(edit(pipe, num_inference_steps=2), stock)


def nothing_left(pipe, cls):
    return type(pipe) is cls and not {"_original_call", "_is_cached"} & vars(cls).keys()


@pytest.mark.slow
def test_enabled_installed_disabled(own, edit, stock, accelerated):
    cls = type(own)
    enable(own)
    install_quietly(own)
    assert runs_stock(own, edit, stock)
    disable(own)  # no AttributeError
    assert is_active(own) and torch.equal(edit(own), accelerated) and specedit.report(own).nfe == 3
    specedit.uninstall(own)
    assert nothing_left(own, cls) and cls.__call__ is FluxKontextPipeline.__call__
    assert torch.equal(edit(own, num_inference_steps=2), stock)


def test_enabled_installed_uninstalled_disabled(own, edit, stock):
    cls = type(own)
    enable(own)
    install_quietly(own)
    specedit.uninstall(own)
    assert runs_stock(own, edit, stock)
    disable(own)
    assert nothing_left(own, cls) and torch.equal(edit(own, num_inference_steps=2), stock)


@pytest.mark.slow
def test_installed_enabled_disabled(own, edit, stock, accelerated):
    cls = type(own)
    specedit.install(own, **QUICK)
    for _ in range(2):
        enable(own)
        assert runs_stock(own, edit, stock)
        disable(own)
        assert is_active(own) and torch.equal(edit(own), accelerated)
    specedit.uninstall(own)
    assert nothing_left(own, cls) and torch.equal(edit(own, num_inference_steps=2), stock)


@pytest.mark.slow
def test_installed_enabled_uninstalled_disabled(own, edit, stock, accelerated):
    """Its patch keeps the class that it stands on; the pipeline is stock all the same."""
    cls = type(own)
    specedit.install(own, **QUICK)
    enable(own)
    specedit.uninstall(own)
    assert not is_active(own) and runs_stock(own, edit, stock)
    with pytest.raises(TypeError, match="edit_mask"):
        edit(own, edit_mask=1)
    disable(own)
    assert not is_active(own) and torch.equal(edit(own, num_inference_steps=2), stock)
    specedit.uninstall(own)
    assert nothing_left(own, cls)


@pytest.mark.slow
def test_installed_enabled_uninstalled_installed_disabled(own, edit, stock, accelerated):
    cls = type(own)
    specedit.install(own, **QUICK)
    enable(own)
    specedit.uninstall(own)
    install_quietly(own)
    assert runs_stock(own, edit, stock)
    disable(own)
    assert is_active(own) and torch.equal(edit(own), accelerated)
    specedit.uninstall(own)
    assert nothing_left(own, cls) and torch.equal(edit(own, num_inference_steps=2), stock)


def test_other_pipelines_of_the_class_are_left_alone(own, make_pipe, edit, stock):
    other = make_pipe(type(own))
    enable(own)
    install_quietly(own)
    disable(own)
    assert torch.equal(edit(other, num_inference_steps=2), stock) and not is_active(other)


def test_another_call_written_over_ours(own, edit):
    """A call that does not lead to ours runs, and is_active says so. Installing again takes the place back."""
    specedit.install(own, **QUICK)
    type(own).__call__ = lambda self, **arguments: "theirs"
    assert not is_active(own) and own() == "theirs"
    specedit.install(own, **QUICK)
    assert is_active(own)


@pytest.mark.slow
def test_a_wrapper_without_a_name_for_what_it_wraps(own, edit, accelerated):
    specedit.install(own, **QUICK)
    ours, calls = type(own).__call__, []

    def counts(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    type(own).__call__ = counts
    assert is_active(own) and torch.equal(edit(own), accelerated) and calls == [1]
    type(own).__call__ = ours
    assert is_active(own) and torch.equal(edit(own), accelerated) and calls == [1]


def test_a_metaclass_of_the_users_own(make_pipe, edit, accelerated):
    class Meta(type):
        pass

    class Mine(FluxKontextPipeline, metaclass=Meta):
        pass

    pipe = specedit.install(make_pipe(Mine), **QUICK)
    assert isinstance(type(pipe), Meta) and torch.equal(edit(pipe), accelerated)
    assert type(specedit.uninstall(pipe)) is Mine

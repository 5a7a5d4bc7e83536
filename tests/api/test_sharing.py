"""Pipelines that share one transformer: the hooks stay for as long as an installation or a running call needs them."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import FluxKontextPipeline

import specedit
from specedit.api.installing import is_active
from tests.api.common import CORNER, QUICK, processors


def share(pipe):
    other = FluxKontextPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def hooked(model):
    return any(hasattr(p, "original") for p in model.attn_processors.values()) or any(
        type(vars(module).get("forward")).__module__.startswith("specedit") for module in model.modules()
    )


def marks(model):
    return [name for name in vars(model) if "specedit" in name]


def clean(model):
    return not hooked(model) and not marks(model)


def close(image, expected):
    """Equal but for rounding: another thread may use other kernels."""
    torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


class Held:
    """A call in another thread that waits at its first step until `finish`."""

    def __init__(self, call, pipe, **arguments):
        self.reached, self.go, self.error = threading.Event(), threading.Event(), None

        def wait(pipe, index, timestep, kwargs):
            if index == 0:
                self.reached.set()
                assert self.go.wait(20)
            return {}

        def work():
            try:
                self.image = call(pipe, callback_on_step_end=wait, **arguments)
            except BaseException as error:  # shown by the thread that waits
                self.error = error
                self.reached.set()

        self.thread = threading.Thread(target=work)
        self.thread.start()
        assert self.reached.wait(20)

    def finish(self):
        self.go.set()
        self.thread.join(20)
        if self.error is not None:
            raise self.error
        return self.image


@pytest.mark.slow
def test_the_last_installation_takes_the_hooks_off(pipe, edit):
    others = [share(pipe), copy.copy(pipe)]
    stock = edit(pipe, num_inference_steps=2)
    for p in (pipe, *others):
        specedit.install(p, **QUICK)
    expected, attached = edit(pipe), processors(pipe)
    for p in (others[0], pipe):
        specedit.uninstall(p)
        assert processors(pipe) == attached and torch.equal(edit(p, num_inference_steps=2), stock)
        specedit.uninstall(p)  # counted once
    assert torch.equal(edit(others[1]), expected)
    specedit.uninstall(others[1])
    assert clean(pipe.transformer)


def test_uninstalling_a_copy_while_another_call_runs(pipe, edit):
    other = share(pipe)
    for p in (pipe, other):
        specedit.install(p, **QUICK)
    expected = edit(pipe)
    held = Held(edit, pipe)
    specedit.uninstall(other)
    close(held.finish(), expected)
    assert is_active(pipe)
    specedit.uninstall(pipe)
    assert clean(pipe.transformer)


@pytest.mark.slow
def test_uninstalling_while_its_own_call_runs(pipe, edit):
    """The call ends as it began, and the hooks go with it; stock calls meanwhile are stock."""
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    held = Held(edit, pipe)
    specedit.uninstall(pipe)
    assert type(pipe) is FluxKontextPipeline and not is_active(pipe) and hooked(pipe.transformer)
    assert torch.equal(edit(share(pipe), num_inference_steps=2), stock)
    close(held.finish(), expected)
    assert clean(pipe.transformer) and torch.equal(edit(pipe, num_inference_steps=2), stock)


@pytest.mark.slow
def test_installing_again_before_the_call_ends(pipe, edit):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    held = Held(edit, pipe)
    specedit.uninstall(pipe)
    specedit.install(pipe, **QUICK)
    close(held.finish(), expected)
    assert torch.equal(edit(pipe), expected)
    specedit.uninstall(pipe)
    assert clean(pipe.transformer)


def test_a_callback_that_uninstalls(pipe, edit):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)

    def remove(pipe, *_):
        specedit.uninstall(pipe)
        return {}

    image = edit(pipe, callback_on_step_end=remove)
    assert torch.equal(image, expected) and clean(pipe.transformer)


def test_a_call_that_fails_after_uninstall(pipe, edit):
    specedit.install(pipe, **QUICK)

    def fail(pipe, *_):
        specedit.uninstall(pipe)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        edit(pipe, callback_on_step_end=fail)
    assert clean(pipe.transformer)


@pytest.mark.slow
def test_install_and_uninstall_of_copies_around_running_calls(pipe, edit):
    """Four copies come and go while the fifth edits."""
    specedit.install(pipe, **QUICK)
    embeds = dict(
        zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_prompt("red", None, max_sequence_length=16))
    )
    ask = dict(prompt=None, edit_mask=CORNER, **embeds)
    expected, stop, errors = edit(pipe, **ask), threading.Event(), []

    def come_and_go(other):
        try:
            while not stop.wait(0.002):
                specedit.uninstall(specedit.install(other, "turbo"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go, args=(share(pipe),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert all(torch.equal(edit(pipe, **ask), expected) for _ in range(4))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    specedit.uninstall(pipe)
    assert clean(pipe.transformer)


@pytest.mark.slow
def test_a_forgotten_pipeline_does_not_count(pipe):
    other = specedit.install(share(pipe), **QUICK)
    specedit.install(pipe, **QUICK)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None and hooked(pipe.transformer)
    specedit.uninstall(pipe)
    assert clean(pipe.transformer)


@pytest.mark.slow
def test_a_plain_pipeline_clears_what_a_forgotten_one_left(pipe):
    other = specedit.install(share(pipe), **QUICK)
    del other
    gc.collect()
    assert hooked(pipe.transformer) and not is_active(pipe)
    specedit.uninstall(pipe)
    assert clean(pipe.transformer)


def test_a_transformer_that_was_replaced_is_cleared_too(make_pipe, edit):
    pipe, other = make_pipe(), make_pipe()
    specedit.install(pipe, **QUICK)
    first, pipe.transformer = pipe.transformer, other.transformer
    edit(pipe)
    specedit.uninstall(pipe)
    assert clean(first) and clean(other.transformer)


def test_a_compiled_transformer_shares_with_the_plain_one(pipe):
    plain, compiled = share(pipe), share(pipe)
    compiled.transformer = torch.compile(pipe.transformer, backend="eager")
    for p in (plain, compiled):
        specedit.install(p, **QUICK)
    specedit.uninstall(compiled)
    assert hooked(pipe.transformer)
    specedit.uninstall(plain)
    assert clean(pipe.transformer)


@pytest.mark.slow
def test_a_deep_copy_of_the_transformer_has_separate_users(pipe, edit):
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    other = share(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(edit(other, num_inference_steps=2), stock)  # what was copied acts as stock
    specedit.install(other, **QUICK)
    specedit.uninstall(pipe)
    assert clean(pipe.transformer) and torch.equal(edit(other), expected)
    specedit.uninstall(other)
    assert clean(other.transformer) and torch.equal(edit(other, num_inference_steps=2), stock)
    lonely = share(pipe)
    lonely.transformer = copy.deepcopy(specedit.install(pipe).transformer)
    specedit.uninstall(lonely)
    assert clean(lonely.transformer) and hooked(pipe.transformer)

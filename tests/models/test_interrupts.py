"""Ctrl-C at any line of install, uninstall and disabled."""

import sys
from collections import Counter
from pathlib import Path

import pytest

import specedit
from specedit.api.installing import is_active
from specedit.models.longcat import LongCatImageEdit
from tests.api.common import QUICK

PACKAGE = str(Path(specedit.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the package that runs inside the block; `passed` counts them.

    A line counts twice at most: loops go over many modules.
    """

    def __init__(self, n):
        self.n, self.passed, self.seen = n, 0, Counter()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self.before)
        return kind is KeyboardInterrupt

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        self.seen[place := (frame.f_code, frame.f_lineno)] += 1
        if event == "line" and self.seen[place] <= 2:
            self.passed += 1
            if self.passed == self.n:
                raise KeyboardInterrupt
        return self.trace


def everything(pipe):
    """The pipeline's class, its attributes, and every attribute of the transformer's modules by identity."""
    modules = [
        (id(module), name, id(value)) for module in pipe.transformer.modules() for name, value in vars(module).items()
    ]
    return type(pipe), {name: id(value) for name, value in vars(pipe).items()}, modules


def every_line(work):
    """Runs `work(interrupt)` with an interrupt at each line in turn, until one comes to its end."""
    for n in range(1, 10_000):
        interrupt = Interrupt(n)
        work(interrupt)
        if interrupt.passed < n:
            return n
    raise AssertionError("no end")


@pytest.fixture(params=["kontext", "qwen", "longcat"])
def make(request, make_pipe):
    """Pipelines with hooks of every kind."""
    if request.param == "kontext":
        return make_pipe
    if request.param == "longcat" and LongCatImageEdit is None:
        pytest.skip("this diffusers has no LongCatImageEditPipeline")
    return request.getfixturevalue(f"make_{request.param}")


def tells_the_truth(pipe, stock):
    """is_active says whether the class's call is SpecEdit's."""
    return is_active(pipe) == (type(pipe) is not stock)


@pytest.mark.slow
def test_install(make):
    pipe = make()
    before, stock = everything(pipe), type(pipe)

    def work(interrupt):
        with interrupt:
            specedit.install(pipe, **QUICK)
        assert tells_the_truth(pipe, stock)
        if not is_active(pipe):
            assert everything(pipe) == before  # undone
        specedit.uninstall(pipe)
        assert everything(pipe) == before and not is_active(pipe)

    assert every_line(work) > 50


def test_uninstall(make):
    pipe = make()
    before, stock = everything(pipe), type(pipe)

    def work(interrupt):
        specedit.install(pipe, **QUICK)
        with interrupt:
            specedit.uninstall(pipe)
        assert tells_the_truth(pipe, stock)
        specedit.uninstall(pipe)
        assert everything(pipe) == before and not is_active(pipe)

    assert every_line(work) > 20


def test_install_after_an_interrupted_uninstall(pipe, edit):
    stock = edit(pipe, num_inference_steps=1)
    expected = edit(specedit.install(pipe, **QUICK))

    def work(interrupt):
        with interrupt:
            specedit.uninstall(pipe)
        assert is_active(specedit.install(pipe, **QUICK))

    every_line(work)
    assert (edit(pipe) == expected).all()
    assert (edit(specedit.uninstall(pipe), num_inference_steps=1) == stock).all()


def test_install_again(pipe):
    """Either the old configuration or the new one, and installed all the time."""
    specedit.install(pipe, "turbo")

    def work(interrupt):
        with interrupt:
            specedit.install(pipe, "fast")
        assert is_active(pipe)
        specedit.install(pipe, "turbo")

    assert every_line(work) > 5


def test_another_librarys_positions_survive(make_qwen):
    pipe = make_qwen()
    rope = pipe.transformer.pos_embed
    stock = rope.forward
    rope.forward = theirs = lambda *args, **kwargs: stock(*args, **kwargs)

    def work(interrupt):
        specedit.install(pipe, **QUICK)
        assert rope.forward is not theirs
        with interrupt:
            specedit.uninstall(pipe)
        specedit.uninstall(pipe)
        assert rope.forward is theirs

    every_line(work)


def test_disabled(pipe):
    specedit.install(pipe)

    def work(interrupt):
        with interrupt, specedit.disabled(pipe):
            assert not is_active(pipe)
        assert is_active(pipe)

    assert every_line(work) > 5


def test_an_error_while_attaching_is_undone(pipe, monkeypatch):
    from specedit.models.flux import FluxKontext

    before, attach = everything(pipe), FluxKontext.attach

    def fail(self, pipe):
        attach(self, pipe)
        raise MemoryError("out of it")

    monkeypatch.setattr(FluxKontext, "attach", fail)
    with pytest.raises(MemoryError, match="out of it"):
        specedit.install(pipe)
    assert everything(pipe) == before and not is_active(pipe)

"""One warning for each cause and pipeline."""

import warnings
from types import SimpleNamespace

import pytest

from specedit.once import warn_once


class Pipe:
    def __init__(self):
        self._specedit = SimpleNamespace(warned=set())  # what `install` hangs on a pipeline


def test_a_cause_is_named_once_for_each_pipeline():
    said, first, second = [], Pipe(), Pipe()
    for pipe in (first, first, second, first):
        warn_once(pipe, "too hot", warn=said.append)
    warn_once(first, "too cold", warn=said.append)
    assert said == ["too hot", "too hot", "too cold"]


def test_one_cause_may_have_many_texts():
    said, pipe = [], Pipe()
    for degrees in (40, 41):
        warn_once(pipe, f"{degrees} degrees", "too hot", said.append)
    assert said == ["40 degrees"]


def test_by_default_it_is_a_python_warning_at_the_callers_line():
    def called(pipe):
        warn_once(pipe, "too hot")

    pipe = Pipe()
    with pytest.warns(UserWarning, match="too hot") as caught:
        called(pipe)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(pipe)


def test_a_pipeline_without_an_installation_warns_every_time():
    said = []
    for _ in range(2):
        warn_once(object(), "too hot", warn=said.append)
    assert said == ["too hot"] * 2

"""A selector from outside."""

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.method.selectors import Selector
from specedit.registry import selectors
from specedit.testing import make_picture


class Corner(Selector):
    """The first cell of every row."""

    name = "corner"

    def score(self, run, draft, draft_grid):
        assert draft.shape[1] == draft_grid.tokens and run.config.selector == "corner"
        score = torch.zeros(run.state.batch, *run.state.grid.shape)
        score[..., 0] = 1
        return score

    def cells(self, score, config):
        cells = torch.zeros(len(score), *(-(-side // 2) for side in score.shape[1:]), dtype=torch.bool)
        cells[..., 0] = True
        return cells


@pytest.fixture(autouse=True)
def corner():
    specedit.register_selector(Corner)
    yield
    selectors.unregister("corner")


def run(pipe, **changes):
    specedit.install(pipe, "turbo", dilation=0, **changes)
    return pipe(make_picture(128, 128), "make it red", output_type="latent").images


def test_it_runs_by_its_name(toy):
    assert run(toy, selector="corner").isfinite().all()
    report = specedit.report(toy)
    assert report.draft_steps == 4
    assert report.edit_mask[0, :, 0].all() and not report.edit_mask[0, :, 1:].any()
    assert report.score[0, :, 0].all() and not report.score[0, :, 1:].any()


def test_only_a_verifying_selector_verifies_the_coarse_stage(toy, monkeypatch):
    config = SpecEditConfig(selector="corner", restore="reference")
    assert not config.verifies_coarse
    monkeypatch.setattr(Corner, "verifies", True)
    assert config.verifies_coarse
    run(toy, selector="corner", restore="reference")
    assert "second look" in [stage.name for stage in specedit.report(toy).stages]


def test_without_a_draft_none_is_made(toy, monkeypatch):
    monkeypatch.setattr(Corner, "needs_draft", False)
    run(toy, selector="corner")
    assert specedit.report(toy).draft_steps == 0 and specedit.report(toy).score is None


def test_a_selector_that_reads_features_needs_a_decoder_that_has_them(toy):
    del toy.vae.decoder.mid_block
    toy.transformer.forward = None  # the error comes before any work
    with pytest.raises(ValueError, match="vae: expected a decoder with conv_in, mid_block and up_blocks"):
        run(toy)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("score", torch.zeros(1, 4, 4), r"selector 'corner': score: expected shape \(1, 8, 8\) and torch.float32, got"),
        ("score", torch.zeros(1, 8, 8).double(), "and torch.float64"),
        ("cells", torch.zeros(1, 8, 8) > 0, r"cells: expected shape \(1, 4, 4\) and torch.bool, got \(1, 8, 8\)"),
        ("cells", torch.zeros(1, 4, 4), "cells: expected .* and torch.float32"),
    ],
)
def test_results_of_another_shape_are_errors(toy, monkeypatch, method, value, message):
    monkeypatch.setattr(Corner, method, lambda *_: value)
    with pytest.raises(ValueError, match=message):
        run(toy, selector="corner")


def test_an_unknown_selector_is_an_error_at_construction():
    with pytest.raises(
        ValueError, match=r"selector: expected one of 'corner', 'edges', .* got 'cornet'; did you mean 'cor"
    ):
        SpecEditConfig(selector="cornet")
    for wrong in (None, 3, Corner):
        with pytest.raises(ValueError, match="selector: expected one of"):
            SpecEditConfig(selector=wrong)
    with pytest.raises(
        ValueError, match="selector: expected one of"
    ):  # a module beside the selectors, but none of them
        SpecEditConfig(selector="__init__")


def test_what_is_no_selector_is_not_registered():
    with pytest.raises(TypeError, match="selector: expected a class that derives from Selector and has a score"):
        specedit.register_selector(print)
    with pytest.raises(TypeError, match="selector: expected a class that derives from Selector and has a score"):
        specedit.register_selector(type("Half", (Selector,), {"name": "half"}))  # it used to run as "edges"
    with pytest.raises(TypeError, match="selector: expected a name, got ''"):
        specedit.register_selector(type("Nameless", (Corner,), {"name": ""}))
    with pytest.raises(ValueError, match="selector: expected a new name, got 'edges'"):
        selectors["edges"]
        specedit.register_selector(type("Other", (Corner,), {"name": "edges"}))


@pytest.mark.parametrize("selector", ["edges", "variance", "uniform"])
def test_a_threshold_without_effect_warns(toy, recwarn, selector):
    with pytest.warns(UserWarning, match=f"threshold: 0.5 has no effect with selector='{selector}'") as warned:
        specedit.install(toy, selector=selector, threshold=0.5)
    assert warned[0].filename == __file__
    recwarn.clear()
    specedit.install(toy, "paper", selector=selector)
    for name in ("semantic", "corner"):  # they choose cells themselves
        specedit.install(toy, selector=name, threshold=0.5)
    assert not recwarn.list

"""What the coarse stage is about to change is verified too, where cells are kept for good."""

import pytest
import torch

import specedit
from specedit.layout import mean_pixels
from specedit.method import sampler, verify
from specedit.method import selectors as select
from specedit.method.cells import CellMasks
from specedit.method.draft import shrink
from specedit.models.flux import FluxKontext
from tests.sampler.common import CORNER, QUICK, close

STAGES = ["encode", "draft", "verify", "coarse", "second look", "mixed", "decode"]


@pytest.fixture
def say(monkeypatch):
    """Lets draft and second look find chosen cells (h, w) of 4 x 4 in every sample; returns what they were shown."""

    def choose(*answers):
        shown, answers = [], iter(answers)

        def find(run, tokens, grid):
            shown.append((tokens, grid))
            cells = torch.zeros(run.state.batch, 4, 4, dtype=torch.bool)
            for row, column in next(answers):
                cells[:, row, column] = True
            return torch.zeros(run.state.batch, 8, 8), cells

        monkeypatch.setattr(select, "select", find)
        return shown

    return choose


@pytest.mark.parametrize("changes", [{"restore": "reference"}, {"keep_pixels": True}])
def test_cells_that_the_draft_missed_are_edited_too(pipe, edit, say, changes):
    shown = say([(0, 0)], [(3, 2)])
    specedit.install(pipe, **QUICK, **changes, uniform_stride=0)
    edit(pipe)
    report = specedit.report(pipe)
    assert len(shown) == 2 and report.edit_mask[0].nonzero().tolist() == [[0, 0], [3, 2]]
    assert torch.equal(report.expand_mask, report.edit_mask) and report.empty_drafts == 0 and report.nfe == 6
    names = [stage.name for stage in report.stages]
    assert names[:5] == STAGES[:5] and names.count("second look") == 1
    assert next(s for s in report.stages if s.name == "second look").seconds > 0


@pytest.mark.parametrize(
    ("changes", "unchanged"),
    [
        ({}, True),
        ({"selector": "edges"}, False),
        ({"selector": "variance"}, False),
        ({"selector": "variance", "restore": "reference"}, True),  # given back as it came
    ],
)
def test_only_what_was_compared_is_unchanged(pipe, edit, say, monkeypatch, changes, unchanged):
    """Selectors that rank cells say nothing of those they leave out, whose detail is then not the reference's."""
    made, of = [], CellMasks.from_detected
    monkeypatch.setattr(CellMasks, "from_detected", lambda *a, **k: made.append(of(*a, **k)) or made[-1])
    say([(0, 0)], [])
    specedit.install(pipe, **QUICK, **changes)
    edit(pipe)
    assert bool(made[0].known_unchanged[0, 3, 3]) == unchanged and not made[0].known_unchanged[0, 0, 0]


@pytest.mark.slow
def test_draft_and_coarse_detection_are_equivalent(pipe, edit, say):
    """The coarse stage does not know yet; all that comes after does."""
    say([(0, 0)], [(3, 2)], [(0, 0), (3, 2)], [], [(0, 0)], [])
    specedit.install(pipe, **QUICK, restore="reference", uniform_stride=0)
    together, by_draft, less = (edit(pipe) for _ in range(3))
    assert torch.equal(together, by_draft) and (together - less).abs().max() > 1e-2


def test_an_edit_found_in_the_coarse_stage_alone_preserves_the_rest(pipe, edit, say):
    say([], [(1, 1)], [], [])
    specedit.install(pipe, **QUICK, restore="reference")
    edit(pipe, num_images_per_prompt=2)
    report = specedit.report(pipe)
    assert report.empty_drafts == 2 and report.edit_mask.flatten(1).sum(1).tolist() == [1, 1]
    edit(pipe)
    assert specedit.report(pipe).empty_drafts == 1 and specedit.report(pipe).edit_fraction == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"restore": "full"},  # the paper's method, which corrects everything in its full stage
        {"restore": "reference", "verify_coarse": False},
        {"restore": "reference", "steps": (0, 2, 2)},
        {"restore": "reference", "selector": "variance"},
    ],
)
def test_runs_that_do_not_verify_the_coarse_stage(pipe, edit, say, changes):
    shown = say([(0, 0)])
    specedit.install(pipe, **QUICK | changes)
    edit(pipe)
    assert len(shown) == 1 and "second look" not in [stage.name for stage in specedit.report(pipe).stages]


def test_caches_are_dropped_before_verification(pipe, edit, say, monkeypatch):
    held, look = [], verify.verify_coarse

    def looking(run, groups):
        held.extend((group.kv, group.forecast) for group in groups)
        return look(run, groups)

    monkeypatch.setattr(verify, "verify_coarse", looking)
    say([(0, 0)], [])
    specedit.install(pipe, **QUICK, restore="reference", reference_refresh=2)
    edit(pipe)
    assert held == [(None, None)] and specedit.report(pipe).cache_bytes > 0


def test_a_callers_mask_is_not_questioned(pipe, edit, say):
    shown = say()
    specedit.install(pipe, **QUICK, restore="reference")
    edit(pipe, edit_mask=CORNER)
    assert not shown and specedit.report(pipe).edit_fraction == 0.25


def test_it_sees_what_the_last_coarse_step_predicts(pipe, edit, say, monkeypatch):
    """A velocity that points at one picture, (x - x0) / s, predicts that picture."""
    target = {}
    evaluate = FluxKontext.velocity

    def velocity(self, run, group, sigma):
        if group.layout.is_coarse:
            wanted = target.setdefault(
                "coarse", torch.randn(group.tokens.shape, generator=torch.Generator().manual_seed(3))
            )
            return (group.tokens - wanted) / sigma
        target["grid"] = run.state.grid
        return evaluate(self, run, group, sigma)

    monkeypatch.setattr(FluxKontext, "velocity", velocity)
    shown = say([(0, 0)], [(0, 0)])
    specedit.install(pipe, **QUICK, restore="reference")
    edit(pipe)
    expected, grid = shrink(target["coarse"], target["grid"].coarse(), 2)
    assert shown[1][1].shape == grid.shape == shown[0][1].shape  # as large as the draft
    close(shown[1][0], expected)
    with pytest.raises(AssertionError):
        close(shown[0][0], expected)


def test_a_prediction_of_the_reference_itself_changes_nothing(pipe, edit, monkeypatch):
    """Without the stub: the decoder's features of the reference at half size, shrunk once more, are the reference's."""

    def velocity(self, run, group, sigma):
        reference = run.state.reference
        if group.layout.grid != run.state.grid:
            wanted = shrink(reference, run.state.grid, run.config.draft_scale)[0]
        else:
            wanted = mean_pixels(reference, run.state.grid) if group.layout.is_coarse else reference
        return (group.tokens - wanted) / sigma

    looked = []
    look = verify.verify_coarse
    monkeypatch.setattr(verify, "verify_coarse", lambda *args: looked.append(look(*args)) or looked[-1])
    stages = sampler.stages
    monkeypatch.setattr(sampler, "stages", lambda config, start: stages(config, start)[:1])
    monkeypatch.setattr(FluxKontext, "velocity", velocity)
    specedit.install(pipe, **QUICK, restore="reference", threshold=1e-6, dilation=0)
    edit(pipe)
    assert len(looked) == 1 and not looked[0][1].any()


def test_a_run_interrupted_in_its_coarse_stage_does_not_verify_it(pipe, edit, say):
    shown = say([(0, 0)])
    specedit.install(pipe, **QUICK, restore="reference")

    def stop(pipe, index, timestep, kwargs):
        pipe._interrupt = True
        return {}

    edit(pipe, callback_on_step_end=stop)
    assert len(shown) == 1 and specedit.report(pipe).nfe == 1

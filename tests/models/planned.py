"""Reports beside what was planned."""

import itertools

import pytest

from specedit.config import presets


def presets_and_restores(first, turn):
    """Every third preset, from number `turn`, with one of the restores, which take turns; three families try all."""
    restores = ("full", "reference") if first == "full" else ("reference", "full")
    return list(zip(list(presets)[turn::3], itertools.cycle(restores)))


def assert_as_planned(report, planned):
    """Stages, steps, tokens and operations of a run are those of its plan, operations to the digit."""
    made = [stage for stage in report.stages if stage.steps]
    assert [stage.name for stage in made] == [row["name"] for row in planned["stages"]]
    for stage, row in zip(made, planned["stages"], strict=True):
        assert (stage.steps, stage.cached, stage.reused) == (row["steps"], row["cached"], row["reused"])
        assert stage.tokens == pytest.approx(row["tokens"])
        assert stage.flops == row["flops"] > 0, stage.name
    assert report.flops == planned["flops"]

"""Reports beside what was planned."""

import pytest


def assert_as_planned(report, planned):
    """Stages, steps, tokens and operations of a run are those of its plan, operations to the digit."""
    made = [stage for stage in report.stages if stage.steps]
    assert [stage.name for stage in made] == [row["name"] for row in planned["stages"]]
    for stage, row in zip(made, planned["stages"], strict=True):
        assert (stage.steps, stage.cached, stage.reused) == (row["steps"], row["cached"], row["reused"])
        assert stage.tokens == pytest.approx(row["tokens"])
        assert stage.flops == row["flops"] > 0, stage.name
    assert report.flops == planned["flops"]

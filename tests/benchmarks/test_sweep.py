"""The settings that the sweep runs."""

from benchmarks import sweep
from specedit.config import resolve


def test_every_setting_is_a_configuration():
    for changes in sweep.GRID.values():
        for change in changes:
            settings = {**sweep.BASE, **change}
            settings.pop("true_cfg_scale", None)  # an argument of the call
            assert resolve(settings.pop("preset"), **settings).nfe == 9


def test_approximations_are_measured_against_their_own_baseline():
    first, *ranges = sweep.GRID["guidance_range"]
    assert set(first) == {"true_cfg_scale"} and ranges
    assert all(change["true_cfg_scale"] == first["true_cfg_scale"] for change in ranges)
    assert all("guidance_range" in change for change in ranges)
    assert [change["reference_refresh"] for change in sweep.GRID["reference_refresh"]] == [2, 4]

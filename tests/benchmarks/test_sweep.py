"""The settings that the sweep runs, and the file that it writes."""

import json

import pytest

from benchmarks import sweep
from specedit.config import resolve


@pytest.mark.parametrize("model", ["kontext", "qwen"])
def test_every_setting_is_a_configuration(model):
    for changes in sweep.grid(model).values():
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


def test_variants_have_unique_names():
    assert len(sweep.variants(sweep.GRID)) == sum(map(len, sweep.GRID.values()))
    assert sweep.variants({"dilation": sweep.GRID["dilation"]}) == {
        f"dilation={d}": dict(group="dilation", change=dict(dilation=d)) for d in (0, 2)
    }


@pytest.fixture
def few_steps(shallow_editors, monkeypatch):
    """Variants start from few-4, for tests of what is written and not of how well it edits."""
    monkeypatch.setitem(sweep.BASE, "preset", "few-4")


@pytest.mark.thorough
def test_interrupted_sweep_is_resumed(few_steps, tmp_path):
    out = tmp_path / "sweep-64.json"
    some = ["--only", "base", "guidance_range", "--size", "64", "--out", str(out)]
    sweep.main([*some, "--cases", "1"])
    first = json.loads(out.read_text())
    base, guided, *_ = first["rows"]
    assert (base["variant"], base["group"], base["change"]) == ("base", "base", {})
    assert guided["change"] == {"true_cfg_scale": "2.5"}
    assert guided["mean"]["flops"] > 1.5 * base["mean"]["flops"]  # two passes a step
    assert all(0 <= row["mean"][name] <= 1 for row in first["rows"] for name in ("recall", "precision"))
    sweep.main([*some, "--cases", "2", "--resume"])
    second = json.loads(out.read_text())
    for old, new in zip(first["rows"], second["rows"], strict=True):
        assert new["cases"][0] == old["cases"][0] and new["mean"]["count"] == 2
        assert [case["seed"] for case in new["cases"]] == [10_000, 10_001]


def test_with_masks_nothing_is_drafted(shallow_editors, tmp_path):
    out = tmp_path / "masks.json"
    assert not set(sweep.FINDING) & set(sweep.grid("qwen", masks=True)) and set(sweep.FINDING) < set(sweep.grid("qwen"))
    sweep.main(["--only", "base", "--size", "64", "--cases", "1", "--textures", "0", "--masks", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["of"]["masks"] is True and "--masks" in written["command"]
    assert written["rows"][0]["mean"]["recall"] == 1


@pytest.mark.thorough
def test_a_selector_that_needs_no_draft_has_no_recall(shallow_editors, tmp_path):
    out = tmp_path / "selectors.json"
    sweep.main(["--only", "selector", "--size", "64", "--cases", "1", "--textures", "0", "--out", str(out)])
    recall = {row["variant"]: row["mean"]["recall"] for row in json.loads(out.read_text())["rows"]}
    assert recall["selector=uniform"] is None and 0 <= recall["selector=edges"] <= 1


@pytest.mark.thorough
def test_a_qwen_editor_is_compared_under_its_own_guidance(few_steps, tmp_path):
    out = tmp_path / "switches-64.json"
    some = ["--model", "qwen", "--only", "base", "guidance_range", "draft_condition"]
    sweep.main([*some, "--size", "64", "--cases", "1", "--out", str(out)])
    rows = {row["variant"]: row["mean"] for row in json.loads(out.read_text())["rows"]}
    assert rows["guidance_range=(0.2, 0.9)"]["flops"] < rows["base"]["flops"]
    assert rows["draft_condition=small"]["flops"] < rows["base"]["flops"]

"""The settings for few steps that are compared, and the file that they go to."""

import json

import pytest

from benchmarks import few_steps
from specedit import SpecEditConfig, presets


def test_every_setting_takes_the_steps_that_it_is_compared_at():
    for name, fields in few_steps.variants().items():
        if "stock" not in fields and "steps=(1, 0, 1)" not in name:
            config = presets[fields["config"]] if "config" in fields else SpecEditConfig(**fields)
            assert config.nfe == int(name[0]), name


@pytest.mark.thorough
def test_settings_stand_beside_stock(shallow_editors, tmp_path):
    out = tmp_path / "few.json"
    names = ["stock-4", "4: few-4", "4: start", "4: draft_steps=0"]
    few_steps.main(["--only", *names, "--size", "64", "--cases", "1", "--textures", "0", "--out", str(out)])
    rows = {row["variant"]: row["mean"] for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == names and 0 <= rows["4: start"]["recall"] <= 1
    assert rows["4: draft_steps=0"]["flops"] < rows["stock-4"]["flops"]


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^--only: expected some of stock-50, .*, got 4: nothing"):
        few_steps.main(["--only", "4: nothing", "--out", str(tmp_path / "few.json")])

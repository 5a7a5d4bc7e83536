"""The table and figure of settings for few steps, made from a result file that holds known figures."""

import importlib

import pytest
from PIL import Image

from tests.scripts.test_make_docs import write


def case(seed, flops, success=True, mask_share=0.1, **more):
    scores = dict(success=success, edit_psnr=20.0, keep_psnr=30.0, flops=flops, seconds=1 + flops / 1e12)
    return dict(seed=seed, mask_share=mask_share, kind="recolor") | scores | more


@pytest.fixture
def few(docs, tmp_path):
    texture = dict(kind="texture", success=None)
    rows = [
        dict(variant="stock-4", cases=[case(0, 8e12), case(1, 8e12, False, 0.9), case(3, 8e12), case(2, 99e12)]),
        dict(variant="4: start", cases=[case(0, 1e12), case(1, 3e12, mask_share=0.9), case(3, 1e12)]),
        dict(variant="8: start", cases=[case(0, 2e12), case(1, 2e12), case(3, 1e12)]),
        dict(variant="4: tried", cases=[case(0, 1e12)]),  # too few tasks for a row
    ]
    for row in rows:
        row.update(mean={}, kinds={})
    for row, distance in zip(rows, (3.0, 4.0, 3.5, 1.0), strict=True):
        for one in row["cases"]:
            if one["seed"] == 3:
                one.update(texture, texture_distance=distance)
                del one["success"]
    write(tmp_path, rows, "few-steps-64.json", of=dict(model="kontext", size=64))
    return importlib.import_module("docs_few_steps")


def test_settings_stand_beside_stock_with_as_many_over_the_tasks_that_all_share(few):
    lines = few.few("few-steps-64.json").splitlines()
    assert lines[0] == "3 tasks. Small edits change at most 15% of the picture." and len(lines) == 11
    assert lines[8].endswith("the 3 tasks that all of them have run. Not run on enough tasks to compare: 4: tried.")
    assert lines[4:6] == [
        "| stock-4 | 50% | 20.0 | 30.0 | 3.00 | - | - | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| 4: start | 100% | 20.0 | 30.0 | 4.00 | - | - | 4.80 | 8.00 | 3.38 | 4.50 |",
    ]


def test_settings_without_stock_of_as_many_have_no_ratios(few, tmp_path):
    write(tmp_path, [dict(variant="4: start", cases=[case(0, 1e12)])], "few-steps-64.json")
    assert few.few("few-steps-64.json").splitlines()[4].endswith("| - | - | - | - | - |")


def test_points_of_the_figure_are_averages_over_the_tasks_of_their_score(few):
    rows = few.by_variant(few.compared("few-steps-64.json"))
    assert few.grouped(rows, "success", False) == {
        "stock": [(8.0, 0.5, "stock-4")], "SpecEdit, 4 steps": [(2.0, 1.0, "4: start")],
        "SpecEdit, 8 steps": [(2.0, 1.0, "8: start")],
    }  # fmt: skip
    assert few.grouped(rows, "texture_distance", True)["SpecEdit, 8 steps"] == [(1.0, 3.5, "8: start")]


@pytest.mark.slow
def test_the_figure_is_drawn_and_nothing_without_a_file(few, tmp_path):
    few.pareto("few-steps-64.json", tmp_path / "figure.png")
    assert min(Image.open(tmp_path / "figure.png").size) > 400
    few.pareto("few-steps-none.json", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists() and few.few("few-steps-none.json") == "*not measured yet*"

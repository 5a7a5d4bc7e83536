"""What the demo tells of two edits, with results whose figures are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from specedit.config import resolve
from specedit.micro import scenes
from specedit.micro.demonstration import Result
from specedit.report_comparison import where_it_looked
from specedit.run_report import RunReport, StageReport


@pytest.fixture
def result():
    case = scenes.sample(3, 128)
    edited = torch.zeros(1, 4, 4, dtype=torch.bool)
    edited[0, 1, 2] = True
    expanded = edited.clone()
    expanded[0, 3, 3] = True
    stages = [StageReport("full", 1.0, 0.0, 9, 600, 2e12, 0.5)]
    run = RunReport(
        nfe=9, draft_steps=8, stages=stages, flops=2e12, flops_stock=20e12, seconds=0.5, edit_mask=edited,
        expand_mask=expanded, config=resolve("turbo"),
    )  # fmt: skip
    shifted = Image.fromarray(np.asarray(case.source) ^ 1)  # no pixel is the input's own
    return Result(case, shifted, 4.0, 20e12, case.target, run)


def test_rows_compare_stock_with_specedit(result):
    rows = {name: values for name, *values in result.rows()}
    assert rows["model evaluations"] == ["50", "9 + 8 draft", ""]
    assert rows["seconds"] == ["4.00", "0.50", "8.0x"] and rows["TFLOPs"] == ["20.000", "2.000", "10.0x"]
    assert rows["edited region, dB from the exact result"][1] == "60.0"
    assert rows["untouched region, dB from the input"][1] == "60.0"
    stock, ours, _ = rows["untouched pixels equal to the input"]
    assert stock == "0%" and int(ours.rstrip("%")) >= 99  # differences up to 2 / 255 are not in the mask


def test_columns_line_up(result):
    lines = result.table().splitlines()
    assert len({line.index(word) + len(word) for line, word in zip(lines[1:4], ("50", "4.00", "20.000"))}) == 1


def test_edited_cells_are_bright(result):
    result.edit = Image.new("RGB", (128, 128), (200, 200, 200))
    light = np.asarray(where_it_looked(result.edit, result.run))[::32, ::32, 0]
    assert light[1, 2] == max(light.flat) > light[3, 3] > light[0, 0] and (light[0, 0] == light[2:, 0]).all()


@pytest.mark.slow
def test_the_figure_shows_both_edits(result, tmp_path):
    result.save_figure(tmp_path / "demo.png")
    first = Image.open(tmp_path / "demo.png").convert("RGB")
    result.stock = Image.new("RGB", (128, 128), (255, 0, 255))
    result.save_figure(tmp_path / "demo.png")
    other = Image.open(tmp_path / "demo.png").convert("RGB")
    assert first.size == other.size and first.width > 1000
    changed = np.argwhere((np.asarray(first) != np.asarray(other)).any(-1))[:, 1]
    assert first.width / 4 - 40 < changed.min() and changed.max() < first.width / 2 + 40  # the second of four

import base64
import dataclasses
import io
import json
import sys
import threading
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from specedit.config import resolve
from specedit.report_figure import score_title
from specedit.run_report import RunReport, StageReport

STAGES = [
    StageReport("draft", 1.0, 0.0, 8, 1024, 111e12, 0.9),
    StageReport("verify", None, None, 0, 0, 0.0, 0.3),
    StageReport("coarse", 1.0, 0.7, 7, 2560, 263e12, 1.6),
    StageReport("mixed", 0.8235, 0.55, 6, 4372, 419e12, 2.4),
    StageReport("full", 0.7097, 0.0, 5, 8704, 827e12, 4.9),
]


def make(**changes):
    generator = torch.Generator().manual_seed(0)
    edit_mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    edit_mask[0, 2:5, 3:9] = True
    expand_mask = edit_mask.clone()
    expand_mask[:, ::3, ::3] = True
    fields = dict(
        nfe=18,
        draft_steps=8,
        stages=STAGES,
        flops=1620e12,
        flops_stock=8270e12,
        seconds=10.1,
        score=4 * torch.rand(2, 16, 24, generator=generator),
        edit_mask=edit_mask,
        expand_mask=expand_mask,
        config=resolve("balanced"),
        source=Image.new("RGB", (192, 128), (90, 120, 60)),
        edit=Image.new("RGB", (192, 128), (160, 60, 60)),
    )
    return RunReport(**{**fields, **changes})


def test_fractions_are_means_of_the_masks():
    report = make()
    assert report.edit_fraction == pytest.approx(18 / 96 / 2)
    assert report.expand_fraction == pytest.approx(report.expand_mask.float().mean().item())
    assert report.expand_fraction > report.edit_fraction
    assert make(edit_fraction=0.4).edit_fraction == 0.4
    assert make(edit_mask=None, expand_mask=None).edit_fraction == 1.0


def test_flops_ratio():
    assert make().flops_ratio == pytest.approx(8270 / 1620)
    assert make(flops=0.0).flops_ratio == float("inf")
    assert make(flops=0.0).to_dict()["flops_ratio"] is None
    assert make(flops=0.0).to_dict()["flops_ratio_50"] is None


def test_the_stock_run_that_a_report_compares_with():
    report = make(flops_stock=28 * 165.4e12, stock_steps=28)
    assert report.flops_ratio == pytest.approx(28 * 165.4 / 1620)
    assert report.flops_ratio_50 == pytest.approx(50 * 165.4 / 1620)
    assert "28 stock steps take 2.86x the FLOPs; 50 take 5.10x, 9% edited" in str(report)
    plain = report.to_dict()
    assert plain["stock_steps"] == 28 and plain["flops_stock"] == report.flops_stock
    assert (plain["flops_ratio"], plain["flops_ratio_50"]) == (report.flops_ratio, report.flops_ratio_50)
    assert "50 stock steps take 5.10x the FLOPs, 9% edited" in str(make())


@pytest.mark.slow
def test_scores_that_are_not_finite(tmp_path):
    report = make(score=torch.full((2, 16, 24), torch.nan), overflowed=2)
    assert "2 of 2 scores were not finite" in str(report)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["overflowed"] == 2 and plain["score"][0][0][0] is None
    report.save_figure(tmp_path / "report.png")


def test_preset_comes_from_the_config():
    assert make().preset == "balanced"
    assert make(config=resolve("turbo", dilation=3)).preset == "turbo, dilation=3"
    assert make(preset="mine").preset == "mine"
    assert make(config=None).preset is None


def test_to_dict_survives_json():
    report = make()
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert back["nfe"] == 18 and back["draft_steps"] == 8 and back["preset"] == "balanced"
    assert back["stages"] == [dataclasses.asdict(stage) for stage in STAGES]
    assert back["config"]["steps"] == [7, 6, 5]
    assert torch.equal(torch.tensor(back["edit_mask"]), report.edit_mask)
    assert torch.equal(torch.tensor(back["expand_mask"]), report.expand_mask)
    torch.testing.assert_close(torch.tensor(back["score"]), report.score, atol=1e-4, rtol=0)
    assert not {"source", "edit"} & set(back)


def test_to_dict_without_grids():
    plain = make(score=None, edit_mask=None, expand_mask=None, config=None).to_dict()
    assert plain["score"] is plain["edit_mask"] is plain["expand_mask"] is plain["config"] is None
    json.dumps(plain, allow_nan=False)


def test_grids_are_kept_on_the_cpu_as_float32_and_bool():
    report = make(score=torch.zeros(1, 4, 4, dtype=torch.bfloat16, requires_grad=True))
    assert report.score.dtype == torch.float32 and not report.score.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": torch.zeros(4, 4)}, ValueError, r"score: expected shape \(B, h, w\), got \(4, 4\)"),
        ({"edit_mask": torch.zeros(1, 4, 4)}, TypeError, "edit_mask: expected dtype torch.bool, got torch.float32"),
        ({"expand_mask": [[True]]}, TypeError, "expand_mask: expected a tensor .* got list"),
    ],
)
def test_wrong_grids(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_table():
    lines = str(make()).splitlines()
    assert "balanced" in lines[0] and "NFE 18 + 8 draft" in lines[0] and "5.10x" in lines[0]
    assert "9% edited" in lines[0]
    row = next(line for line in lines if line.startswith("mixed"))
    assert row.split() == ["mixed", "0.82", "->", "0.55", "6", "4,372", "419", "2.40"]
    assert next(line for line in lines if line.startswith("verify")).split()[1] == "-"
    assert lines[-1].split() == ["total", "18", "+", "8", "1,620", "10.10"]
    widths = {len(line) for line in lines[1:]}
    assert len(widths) == 1  # columns line up


def test_small_models_keep_their_digits():
    tiny = make(stages=[StageReport("full", 1.0, 0.0, 9, 600, 0.0312e12, 0.5)], flops=0.0312e12)
    assert "0.0312" in str(tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [
        {},
        {"score": None},
        {"edit_mask": None},
        {"source": None, "edit": None},
        {"score": None, "edit_mask": None, "expand_mask": None, "source": None, "edit": None},
        {"config": None, "flops": 0.0},
    ],
    ids=lambda missing: "-".join(missing) or "everything",
)
def test_figure(tmp_path, missing):
    path = tmp_path / "report.png"
    make(**missing).save_figure(path, sample=1)
    image = Image.open(path).convert("L")
    low, high = image.getextrema()
    assert image.width >= 900 and low < 100 and high == 255


def test_the_title_of_a_score_names_what_it_was_compared_with():
    assert score_title(make()) == f"verification score (threshold {resolve('balanced').threshold:g})"
    assert score_title(make(config=resolve(selector="variance"))) == "score of selector 'variance'"
    assert score_title(make(config=None)) == "score"


@pytest.mark.slow
def test_figure_shows_the_mask_where_it_is(tmp_path):
    # With the edited cells moved, the figure changes; with another sample of the batch it changes too.
    def pixels(report, sample=0):
        report.save_figure(tmp_path / "x.png", sample)
        return Image.open(tmp_path / "x.png").convert("RGB").tobytes()

    moved = make()
    moved.edit_mask = moved.edit_mask.roll(2, dims=2)
    first = pixels(make())
    assert pixels(make()) == first
    assert pixels(moved) != first and pixels(make(), sample=1) != first


def test_figure_rejects_what_it_cannot_draw(tmp_path):
    for sample in (2, -1):
        with pytest.raises(ValueError, match="sample: expected an index from 0 to 1"):
            make().save_figure(tmp_path / "x.png", sample=sample)
    with pytest.raises(ValueError, match="xyz"):
        make().save_figure(tmp_path / "x.xyz")


@pytest.mark.slow
def test_figure_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    threads = [threading.Thread(target=make().save_figure, args=(tmp_path / f"{i}.png",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == before


class Shown(HTMLParser):
    """The tags, pictures and text of HTML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data):
        self.cells.append(data)


@pytest.mark.slow
def test_a_notebook_shows_title_figure_and_table():
    report = make()
    shown = Shown(report._repr_html_())
    kind, _, encoded = shown.pictures[0]["src"].partition(",")
    assert kind == "data:image/png;base64" and shown.pictures[0]["alt"] == report.title()
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as figure:
        assert figure.width > 700
    assert shown.cells == [report.title(), *(cell for line in report.table() for cell in line if cell)]
    assert shown.tags.count("tr") == len(STAGES) + 2


def test_a_notebook_escapes_what_users_typed():
    name = '"><script>alert(1)</script> $\\frac$'
    report = make(preset=name, stages=[dataclasses.replace(STAGES[0], name="<b>draft</b>")])
    shown = Shown(report._repr_html_())
    assert not {"script", "b"} & set(shown.tags)
    assert shown.cells[0] == report.title() == shown.pictures[0]["alt"] and "<b>draft</b>" in shown.cells


@pytest.mark.slow
def test_a_preset_named_with_dollar_signs_is_no_formula(tmp_path):
    make(preset="a $\\nothing$").save_figure(tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as figure:
        assert figure.width > 700

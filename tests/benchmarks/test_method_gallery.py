"""The gallery takes the settings that the table shows to be nearest to the ratio, and draws them side by side."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import method_gallery


def row(variant, group, flops):
    return dict(variant=variant, group=group, mean=dict(flops=flops))


ROWS = [
    row("stock-50", "stock", 50.0), row("stock-10", "stock", 10.0), row("stock-1", "stock", 1.0),
    row("reuse N=3", "cache", 17.0), row("reuse N=5", "cache", 11.0), row("turbo-full", "specedit", 8.0),
    row("turbo-reference", "specedit", 4.0), row("fast-reference", "specedit", 9.0), row("no draft", "idea", 10.0),
]  # fmt: skip


def test_the_nearest_setting_of_every_method():
    assert method_gallery.nearest(ROWS) == ["stock-10", "reuse N=5", "turbo-full", "fast-reference"]
    assert method_gallery.nearest(ROWS, 50)[0] == "stock-1"


@pytest.mark.thorough
def test_the_pictures(tmp_path, monkeypatch):
    cheap = {
        "stock-10": {"group": "stock", "steps": 1},
        "turbo-full": {"group": "specedit", "preset": "turbo", "fields": {"steps": (1, 1, 1)}},
    }
    monkeypatch.setattr(method_gallery, "variants", lambda: cheap)
    table = tmp_path / "table.json"
    table.write_text(json.dumps(dict(of=dict(model="kontext", size=64), rows=ROWS)))
    method_gallery.main(["--table", str(table), "--out", str(tmp_path), "--seeds", "3", "--textures"])
    gallery, where = (Image.open(tmp_path / f"methods-{name}.jpg") for name in ("gallery", "where"))
    tile, side, head = (getattr(method_gallery.FORM, name) for name in ("tile", "side", "head"))
    assert gallery.size == (side + 4 * tile, head + tile)  # source, right answer, two variants
    assert where.size == (side + 2 * tile, head + tile)  # stock has no mask


def test_dark_is_what_was_not_looked_at():
    white = Image.new("RGB", (8, 8), "white")
    shaded = method_gallery.shade(white, torch.tensor([[True, False]]))
    assert shaded.getpixel((0, 0)) == (255, 255, 255)
    assert shaded.getpixel((7, 0)) == pytest.approx((64, 64, 64), abs=1)


def test_a_gap_parts_the_pictures():
    form = method_gallery.Form(tile=8, head=4, side=2, letters=4, gap=2)
    made = method_gallery.sheet(["", ""], [("", [Image.new("RGB", (8, 8))] * 2)], form)
    assert made.size == (18, 12)
    row = [made.getpixel((x, 6))[0] for x in range(2, 18)]
    assert row == ([0] * 6 + [255] * 2) * 2

"""The benchmark of sessions, with a shallow editor."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import session
from specedit.micro import scenes
from specedit.run_report import RunReport


def test_its_scenes_have_objects_that_their_shapes_name():
    (seed, scene), (other, _) = session.chosen_scenes(2)
    shapes = [thing.shape for thing in scene.before]
    assert seed != other and len(set(shapes)) == len(shapes) > 1
    asked = session.recolourings(scene, 2 * len(shapes))
    assert len(set(asked)) == len(asked) and [thing.shape for thing in asked] == shapes * 2
    assert not set(asked) & set(scene.before)
    keep = session.kept_pixels(scene, 64)
    source = np.asarray(scenes.sample(seed, 64, "recolor").source)
    assert keep.shape == source.shape[:2] and 0 < keep.mean() < 1


@pytest.mark.thorough
def test_a_row_for_every_edit(shallow_editors, tmp_path):
    path = tmp_path / "session.json"
    session.main(["--scenes", "1", "--edits", "2", "--size", "64", "--preset", "few-4", "--out", str(path)])
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks.session --scenes 1 --edits 2 --size 64 --preset few-4"
    assert [(r["variant"], r["edit"], r["again"]) for r in result["rows"]] == [
        (variant, *at) for variant in session.VARIANTS for at in ((1, False), (2, False), (2, True))
    ]
    for row in result["rows"]:
        assert row["prompt_encodings"] == row["picture_encodings"] == (0 if row["again"] else 1)
        assert row["seconds"] > 0 and isinstance(row["success"], bool)
    first = result["rows"][0]  # of a session whose masks are the objects': kept pixels stay what they are
    assert 0 < first["untouched"] < 1 and first["haze_psnr"] == 60 and "haze_psnr" not in result["rows"][2]


def test_untouched_pixels_are_those_of_no_edited_cell():
    cells = torch.zeros(1, 3, 3, dtype=torch.bool)
    cells[0, 0, 2] = True
    report = RunReport(nfe=1, draft_steps=0, stages=[], flops=1.0, flops_stock=1.0, seconds=1.0, edit_mask=cells)
    edited = session.edited_pixels(report, 80)  # three cells of 32 px, the last ones cut
    assert edited.shape == (80, 80) and edited[:32, 64:].all() and edited.sum() == 32 * 16
    assert session.edited_pixels(dataclasses.replace(report, edit_mask=None), 80).all()

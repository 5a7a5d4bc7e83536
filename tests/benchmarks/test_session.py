"""The benchmark of sessions, with a shallow editor."""

import json

import numpy as np
import pytest

from benchmarks import session
from specedit.micro import scenes


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


@pytest.mark.slow
def test_a_row_for_every_edit(shallow_editors, tmp_path):
    path = tmp_path / "session.json"
    session.main(["--scenes", "1", "--edits", "2", "--size", "64", "--preset", "turbo", "--out", str(path)])
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks.session --scenes 1 --edits 2 --size 64 --preset turbo"
    assert [(r["variant"], r["edit"], r["again"]) for r in result["rows"]] == [
        (variant, *at) for variant in session.VARIANTS for at in ((1, False), (2, False), (2, True))
    ]
    for row in result["rows"]:
        assert row["prompt_encodings"] == row["picture_encodings"] == (0 if row["again"] else 1)
        assert row["seconds"] > 0 and isinstance(row["success"], bool)

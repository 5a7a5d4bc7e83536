"""The benchmark of sessions, with a shallow editor."""

import json

import numpy as np

from benchmarks import session
from specedit.micro import scenes


def test_its_scenes_and_prompts_name_every_object_by_its_shape():
    (seed, scene), (other, _) = session.chosen_scenes(2)
    shapes = [thing.shape for thing in scene.before]
    assert seed != other and len(set(shapes)) == len(shapes) > 1
    prompts = session.prompts(scene, 2 * len(shapes))
    assert len(set(prompts)) == len(prompts)
    for i, prompt in enumerate(prompts):
        thing = scene.before[i % len(shapes)]
        assert f" the {thing.shape} " in prompt and not prompt.endswith(f" {thing.colour}")
    keep = session.kept_pixels(scene, 64)
    source = np.asarray(scenes.sample(seed, 64, "recolor").source)
    assert keep.shape == source.shape[:2] and 0 < keep.mean() < 1


def test_a_row_for_every_edit(shallow_editors, tmp_path):
    path = tmp_path / "session.json"
    session.main(["--scenes", "1", "--edits", "2", "--size", "64", "--preset", "turbo", "--out", str(path)])
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks.session --scenes 1 --edits 2 --size 64 --preset turbo"
    assert [(r["variant"], r["edit"], r["again"]) for r in result["rows"]] == [
        (variant, *at) for variant in session.VARIANTS for at in ((1, False), (2, False), (2, True))
    ]
    for row in result["rows"]:
        assert row["picture_encodings"] == (0 if row["again"] else 1) and row["seconds"] > 0
        assert row["prompt_encodings"] == 0 or (not row["again"] and row["variant"] == "masked")  # who comes first

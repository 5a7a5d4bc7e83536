"""What can be known of a task's result: all but what an object hid."""

import json

import numpy as np
import pytest

from benchmarks import ceiling
from specedit.micro import scenes
from specedit.micro.evaluation import grow, score
from specedit.micro.render import coverage


@pytest.mark.parametrize("kind", ["add", "recolor", "background", "greyscale"])
def test_target_is_exact_without_hidden_background(kind):
    case = scenes.sample(3, 64, kind)
    assert ceiling.guessed(scenes.describe(3, kind), case) is case.target


@pytest.mark.parametrize("kind", ["remove", "shape"])
def test_hidden_background_is_inpainted(kind):
    plain = next(s for s in range(200) if scenes.describe(s, kind).background.kind == "plain")
    scene, case = scenes.describe(plain, kind), scenes.sample(plain, 96, kind)
    assert score(ceiling.guessed(scene, case), case)["edit_psnr"] > 45  # one colour is guessed from around

    photo = next(s for s in range(200) if scenes.describe(s, kind).background.kind == "photo")
    scene, case = scenes.describe(photo, kind), scenes.sample(photo, 96, kind)
    result, source, target = (np.asarray(i) for i in (ceiling.guessed(scene, case), case.source, case.target))
    hid = grow(coverage(scene.before[:1], 96, 96)[0].numpy() > 0, ceiling.RIM)
    drawn = coverage(scene.after[:1], 96, 96)[0].numpy() if kind == "shape" else np.zeros(hid.shape)
    kept = ~hid & (drawn == 0)
    assert np.array_equal(result[kept], source[kept]) and np.array_equal(result[drawn == 1], target[drawn == 1])
    assert not np.array_equal(result[hid], target[hid])  # the target is not looked at


def test_the_file_holds_every_task_once(tmp_path):
    out = tmp_path / "c.json"
    ceiling.main(["--cases", "5", "--size", "64", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert [case["seed"] for case in row["cases"]] == [0, 1, 2, 3, 4] and row["mean"]["count"] == 5
    assert row["mean"]["success"] == sum(case["success"] for case in row["cases"]) / 5

"""Tasks: exact, reproducible, the same in every batch, and never shared by training and evaluation."""

import numpy as np
import pytest
import torch

from specedit.micro import photos, scenes
from specedit.micro.vocabulary import BACKGROUNDS, COLOURS, KINDS, PHRASES, PLACES, SHAPES


def test_every_kind_can_be_drawn():
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(KINDS) == 6
    assert all(len(PHRASES[kind]) >= 3 for kind in KINDS)


def test_seed_determines_the_task():
    a, b = scenes.sample(11, 96), scenes.sample(11, 96)
    assert a.prompt == b.prompt and np.array_equal(np.asarray(a.source), np.asarray(b.source))
    assert np.array_equal(np.asarray(a.target), np.asarray(b.target)) and np.array_equal(a.mask, b.mask)
    assert scenes.sample(12, 96).prompt != a.prompt or scenes.sample(12, 96).kind != a.kind


def test_a_task_looks_the_same_in_every_batch_and_through_every_window():
    described = [scenes.describe(s) for s in range(6)]
    source, target, mask = scenes.draw(described, 64, 96)
    for i, scene in enumerate(described):
        alone = scenes.draw([scene], 64, 96)
        assert torch.allclose(source[i], alone[0][0], atol=1e-6) and torch.allclose(target[i], alone[1][0], atol=1e-6)
        assert torch.equal(mask[i], alone[2][0])
    window = torch.tensor([[16, 32, 40, 48]] * 6)
    part = scenes.draw(described, 64, 96, window)
    assert torch.allclose(part[0], source[:, :, 16:56, 32:80], atol=1e-4)
    assert torch.equal(part[2], mask[:, 16:56, 32:80])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_where_source_and_target_differ(kind):
    for seed in range(4):
        case = scenes.sample(seed, 128, kind=kind)
        assert case.kind == kind and case.mask.shape == (128, 128) and case.mask.dtype == bool
        difference = np.abs(np.asarray(case.source, int) - np.asarray(case.target, int)).max(-1)
        assert (difference[~case.mask] <= 3).all()  # 2/255 and the rounding of both
        assert case.mask.any()
        if kind in ("recolor", "remove", "add", "shape"):
            assert case.mask.mean() < 0.15


def test_greyscale_has_no_colour_and_keeps_luminance():
    case = scenes.sample(3, 64, kind="greyscale")
    target = np.asarray(case.target, float)
    assert np.ptp(target, axis=-1).max() == 0
    luma = np.asarray(case.source, float) @ [0.299, 0.587, 0.114]
    assert np.abs(luma - target[..., 0]).max() <= 1


def test_prompt_describes_the_edit():
    for seed in range(40):
        scene = scenes.describe(seed)
        words = scene.prompt
        if scene.kind == "remove":
            (gone,) = set(scene.before) - set(scene.after)
            assert gone.shape in words
        if scene.kind == "add":
            (new,) = set(scene.after) - set(scene.before)
            place = max((p for p in PLACES if p in words), key=len)
            column, row = PLACES[place]
            assert (new.x, new.y) == ((column + 0.5) / 3, (row + 0.5) / 3)
            assert new.colour in words and new.shape in words
        if scene.kind == "recolor":
            changed = next(b for a, b in zip(scene.before, scene.after, strict=True) if a != b)
            assert changed.colour in words
        if scene.kind == "background":
            assert scene.new_background.kind in BACKGROUNDS
            assert scene.before == scene.after


def test_prompt_identifies_one_object():
    for seed in range(60):
        scene = scenes.describe(seed)
        looks = [(t.shape, t.colour) for t in scene.before]
        assert len(set(looks)) == len(looks)
        if scene.kind in ("recolor", "remove", "shape"):
            chosen = scene.before[0]
            if f"{chosen.colour} {chosen.shape}" not in scene.prompt:
                assert sum(t.shape == chosen.shape for t in scene.before) == 1


def test_half_the_backgrounds_are_photographs_and_evaluation_has_its_own():
    chosen = [scenes.describe(s).background for s in range(1000)]
    share = sum(b.kind == "photo" for b in chosen) / 1000
    assert 0.45 < share < 0.55
    seen = {b.photo for b in chosen if b.kind == "photo"}
    trained = {
        b.photo for b in (scenes.describe(scenes.TRAINING_SEED + s).background for s in range(200)) if b.kind == "photo"
    }
    assert seen <= set(photos.EVALUATION) and trained <= set(photos.TRAINING) and not seen & trained
    names = {photos.NAMES[i].rsplit("_", 1)[0] for i in photos.EVALUATION}
    assert not names & {photos.NAMES[i].rsplit("_", 1)[0] for i in photos.TRAINING}


def test_sizes_need_not_be_square():
    case = scenes.sample(5, (96, 160))
    assert case.source.size == (160, 96) and case.mask.shape == (96, 160)


def test_a_scene_is_the_same_picture_at_every_size():
    small, large = (np.asarray(scenes.sample(2, s).source.resize((64, 64)), float) for s in (128, 256))
    assert np.abs(small - large).mean() < 4


@pytest.mark.parametrize("seed", [-1, 1.5, "7", None])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed: expected an integer"):
        scenes.sample(seed, 64)


def test_bad_size_and_kind():
    with pytest.raises(ValueError, match="at least 16 px"):
        scenes.sample(0, 8)
    with pytest.raises(ValueError, match="expected one of recolor"):
        scenes.sample(0, 64, kind="paint")


@pytest.mark.parametrize("kind", KINDS)
def test_the_place_of_an_edit_is_where_the_mask_is(kind):
    for seed in range(12):
        scene, case = scenes.describe(seed, kind), scenes.sample(seed, 96, kind)
        if kind in ("background", "greyscale"):
            assert scene.place is None
            continue
        rows, columns = np.nonzero(case.mask)
        column, row = scene.place
        assert int(columns.mean() / 32) == column and int(rows.mean() / 32) == row

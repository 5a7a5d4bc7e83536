"""Textures are judged by distribution: on renders alone, what is wrong scores worse than a fresh right answer."""

import functools
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from specedit.evaluation import textures as judge
from specedit.evaluation.texture_statistics import describe
from specedit.micro.textures import MATERIALS, texture

SIDE, SEEDS, SET = 128, 3, 8
MARGIN = 1.2  # how much farther than fresh answers something wrong must be, at least


@functools.cache
def draw(material, first, count, side=SIDE):
    """Renders, made once: no test changes them."""
    return torch.stack([texture(material, first + i, side, side) for i in range(count)])


def ground(side=SIDE):
    """A background with holes for three objects."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    holes = [torch.hypot(y - side * v, x - side * u) < 0.13 * side for v, u in ((0.2, 0.2), (0.5, 0.8), (0.8, 0.35))]
    return ~torch.stack(holes).any(0)


def disc(radius=25, side=SIDE):
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    return torch.hypot(y - 60, x - 66) < radius


def blurred(pictures, sigma):
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    kernel = torch.outer(kernel, kernel / kernel.sum() ** 2).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(pictures, (reach,) * 4, mode="reflect"), kernel, groups=3).clamp(0, 1)


def resized(pictures, factor):
    out = F.interpolate(pictures, scale_factor=factor, mode="bicubic", antialias=factor < 1).clamp(0, 1)
    return out[..., :SIDE, :SIDE].contiguous()


@pytest.fixture(scope="module")
def fresh():
    """Two sets of renders of every material."""
    return {m: (draw(m, 1000, SET), draw(m, 2000, SET)) for m in MATERIALS}


@pytest.fixture(scope="module")
def reference(fresh):
    """The reference of a material in a region, made once."""
    known = {}

    def make(material, region):
        key = material, int(region.sum())
        if key not in known:
            known[key] = judge.reference(fresh[material][0][0], region, *fresh[material])
        return known[key]

    return make


@pytest.fixture(scope="module")
def distance(reference):
    """Mean distance of pictures of a material in a region."""
    described = {}  # with the pictures, so that no others get their identity

    def measure(material, pictures, region):
        key = id(pictures), int(region.sum())
        if key not in described:
            described[key] = describe(pictures, region), pictures
        found = described[key][0]
        each = [{name: values[i : i + 1] for name, values in found.items()} for i in range(len(pictures))]
        return sum(reference(material, region).distance(one)["distance"] for one in each) / len(each)

    return measure


@pytest.mark.thorough
@pytest.mark.parametrize("region", [ground(), disc()], ids=["ground", "disc"])
def test_fresh_answers_average_one(distance, region):
    means = [distance(m, draw(m, 0, SET), region) for m in MATERIALS]
    assert 0.9 < sum(means) / len(means) < 1.1
    assert all(0.6 < mean < 1.5 for mean in means)


@pytest.mark.thorough
@pytest.mark.parametrize("material", MATERIALS)
def test_what_is_wrong_is_farther_than_fresh_answers(distance, material):
    good, region = draw(material, 0, SEEDS), ground()
    large = draw(material, 0, SEEDS, 2 * SIDE)
    noise = torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    wrong = {
        "blur": blurred(good, 2.5),
        "noise": (good + 0.05 * noise).clamp(0, 1),
        "larger": resized(good, 1.5),
        "smaller": resized(large, 0.67),
        "flat": good.mean((2, 3), keepdim=True).expand_as(good),
        "mean of many": draw(material, 0, 16).mean(0)[None],
    }
    wrong |= {other: draw(other, 0, SEEDS) for other in MATERIALS if other != material}
    fine = distance(material, good, region)
    for name, pictures in wrong.items():
        assert distance(material, pictures, region) > MARGIN * fine, name


@pytest.mark.thorough
@pytest.mark.parametrize("material", MATERIALS)
def test_a_blurred_object_is_farther_than_a_fresh_one(distance, material):
    good = draw(material, 0, SEEDS)
    fine, bad = (distance(material, p, disc()) for p in (good, blurred(good, 4)))
    assert bad > MARGIN * fine


@pytest.mark.thorough
def test_turned_textures_are_as_near(distance):
    for material in MATERIALS:
        good = draw(material, 0, SEEDS)
        fine, turned = (distance(material, p, disc()) for p in (good, good.transpose(2, 3).flip(2)))
        assert turned == pytest.approx(fine, rel=0.35)


@pytest.mark.thorough
@pytest.mark.parametrize("region", [ground(), disc(), disc(16)], ids=["ground", "disc", "small disc"])
def test_nearest_material_is_the_right_one(reference, region):
    known = {m: reference(m, region) for m in MATERIALS}
    wrong = [
        (m, seed)
        for m in MATERIALS
        for seed, picture in enumerate(draw(m, 0, SEEDS))
        if judge.nearest(describe(picture[None], region), known) != m
    ]
    assert len(wrong) <= (1 if region.sum() < 1000 else 0)


@pytest.mark.thorough
def test_material_of_a_picture(fresh):
    picture = Image.fromarray((draw("pebbles", 7, 1)[0].permute(1, 2, 0) * 255).round().byte().numpy())
    few = {name: fresh[name] for name in ("marble", "pebbles")}
    assert judge.material(picture, ground().numpy(), few) == "pebbles"
    with pytest.raises(ValueError, match="fresh: expected at least one material, got none"):
        judge.material(picture, ground().numpy(), {})


def in_place(textures, region, around):
    return torch.where(region, textures, around)


@pytest.mark.thorough
@pytest.mark.parametrize("material", MATERIALS)
def test_visible_seams_are_farther_than_fresh_borders(fresh, material):
    region, around = ground(), draw("ripples" if material == "clouds" else "clouds", 50, 1)[0]
    a, b = (in_place(part, region, around) for part in fresh[material])
    good = in_place(draw(material, 0, SEEDS), region, around)
    inner = F.max_pool2d((~region)[None].float(), 7, 1, 3)[0] == 0
    rim = region & ~inner
    wrong = {
        "line": torch.where(rim & (F.max_pool2d((~region)[None].float(), 3, 1, 1)[0] > 0), 0.0, good),
        "rim of the source": torch.where(rim, around.roll(40, 1).mean((1, 2), keepdim=True), good),
        "soft": torch.where(F.max_pool2d((~inner)[None].float(), 7, 1, 3)[0] > 0, blurred(good, 2), good),
    }
    fine = np.mean([judge.seam(picture, region, a, b) for picture in good])
    assert 0.5 < fine < 1.7
    for name, pictures in wrong.items():
        assert np.mean([judge.seam(picture, region, a, b) for picture in pictures]) > 1.5 * fine, name


def test_a_whole_picture_has_no_seam(fresh):
    assert math.isnan(judge.seam(fresh["marble"][0][0], torch.ones(SIDE, SIDE, dtype=torch.bool), *fresh["marble"]))


@pytest.mark.thorough
def test_parts_have_names_and_one_picture_is_enough(fresh):
    parts = judge.texture_distance(draw("marble", 3, 1)[0], ground(), *fresh["marble"])
    names = ["distance", "spectrum", "magnitudes", "orientations", "colours", "patches_5", "patches_13"]
    assert list(parts) == names and all(math.isfinite(value) for value in parts.values())
    assert parts["distance"] == pytest.approx(sum(parts[name] for name in names[1:]) / 6)
    thin = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    thin[40:48, 10:90] = True  # no room for 13 px
    assert list(judge.texture_distance(draw("marble", 3, 1)[0], thin, *fresh["marble"])) == names[:-1]


@pytest.mark.thorough
def test_arrays_tensors_and_pictures_are_judged_alike(fresh):
    region, (a, b) = ground(), (part[:3] for part in fresh["wood grain"])
    array = (draw("wood grain", 3, 1)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    floats = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    first = judge.texture_distance(floats, region, a, b)
    assert judge.texture_distance(floats, region, a, b) == first
    for same in (array, torch.from_numpy(array), floats.numpy(), floats.double(), Image.fromarray(array)):
        assert judge.texture_distance(same, region.numpy(), a.numpy(), b) == pytest.approx(first, rel=1e-4)


@pytest.mark.thorough
def test_fresh_answers_go_through_the_autoencoder(fresh):
    """What an autoencoder blurs is not the editor's fault."""
    region, (a, b) = ground(), fresh["brush strokes"]
    seen = []

    def through(pictures):
        seen.append(len(pictures))
        return blurred(pictures, 1.5)

    result = blurred(draw("brush strokes", 3, 1), 1.5)[0]
    plain, fair = (judge.texture_distance(result, region, a, b, through=t)["distance"] for t in (None, through))
    assert fair < 1.6 < plain and sum(seen) == 2 * SET
    with pytest.raises(ValueError, match=r"through: expected pictures \(8, 3, 128, 128\), got \(8, 3, 64, 128\)"):
        judge.texture_distance(result, region, a, b, through=lambda pictures: pictures[:, :, :64])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(region=torch.zeros(SIDE, SIDE, dtype=torch.bool)), ValueError, "region: expected pixels .*, got none"),
        (dict(region=disc(3)), ValueError, r"region: expected room for 24 patches of 5 x 5 px, got \d+ in \d+ px"),
        (dict(region=ground().float()), TypeError, "region: expected bool, got float32"),
        (dict(region="disc"), TypeError, "region: expected a bool tensor or array .*, got str"),
        (dict(region=ground(64)), ValueError, r"region: expected the picture's 128 x 128 px, got \(64, 64\)"),
        (dict(generated=torch.zeros(1, 3, SIDE, SIDE)), ValueError, r"generated: .*, got the shape \(1, 3, 128, 128\)"),
        (dict(generated=torch.zeros(SIDE, SIDE, 3)), ValueError, r"generated: .*, got the shape \(128, 128, 3\)"),
        (dict(generated=torch.zeros(3, SIDE, SIDE, dtype=torch.long)), TypeError, "generated: .*, got int64"),
        (dict(generated=[[0]]), TypeError, "generated: expected a picture .*, got list"),
        (dict(generated=torch.full((3, SIDE, SIDE), 255.0)), ValueError, "generated: expected values in 0..1"),
        (dict(generated=torch.full((3, SIDE, SIDE), math.nan)), ValueError, "generated: .* or not finite"),
        (dict(fresh_a=torch.zeros(4, 3, 64, 64)), ValueError, "fresh_a: .* of 128 x 128 px, got 4 of 64 x 64 px"),
        (dict(fresh_b=torch.zeros(0, 3, SIDE, SIDE)), ValueError, "fresh_b: expected at least one picture .*, got 0"),
        (dict(fresh_b=torch.zeros(3, SIDE, SIDE)), ValueError, r"fresh_b: .*, got the shape \(3, 128, 128\)"),
    ],
)
@pytest.mark.parametrize("function", [judge.texture_distance, judge.seam])
def test_wrong_arguments_are_named(fresh, function, change, error, says):
    if function is judge.seam and ("room" in says or "pixels" in says):
        says = "region: expected a border of at least 16 px, got"
        change = dict(region=torch.zeros(SIDE, SIDE, dtype=torch.bool))
    a, b = fresh["clouds"]
    given = dict(generated=a[0], region=ground(), fresh_a=a[:2], fresh_b=b[:2]) | change
    with pytest.raises(error, match=says):
        function(**given)


def test_a_picture_takes_little_time():
    picture, region = draw("pebbles", 0, 1, 256), ground(256)
    describe(picture, region)
    took = []
    for _ in range(3):
        began = time.process_time()
        describe(picture, region)
        took.append(time.process_time() - began)
    assert min(took) < 0.05 * max(1, torch.get_num_threads())

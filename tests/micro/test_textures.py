"""Materials and the edits that ask for them: reproducible, of the right size, with any number of right answers."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from specedit import micro
from specedit.micro import scenes, textures
from specedit.micro.kontext import TEXT_TOKENS, CappedTokenizer
from specedit.micro.textures import MATERIALS, PALETTES, texture
from specedit.micro.vocabulary import COLOURS, KINDS, PHRASES, SHAPES

WEIGHTS = Path(micro.__file__).parent / "weights" / "kontext"


@pytest.mark.parametrize("material", MATERIALS)
def test_a_seed_determines_a_texture_and_another_draws_another(material):
    one = texture(material, 3, 96, 128)
    assert one.shape == (3, 96, 128) and one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, texture(material, 3, 96, 128))
    assert (one - texture(material, 4, 96, 128)).abs().mean() > 0.05
    assert one.std((1, 2)).mean() > 0.05  # it has features


@pytest.mark.parametrize("material", MATERIALS)
def test_a_window_is_that_part_of_the_whole(material):
    whole = texture(material, 7, 200, 300)
    assert torch.allclose(texture(material, 7, 50, 60, top=131, left=220), whole[:, 131:181, 220:280], atol=1e-4)
    # A larger picture shows more of the material, not larger features.
    assert torch.allclose(texture(material, 7, 64, 64), whole[:, :64, :64], atol=1e-4)


@pytest.mark.parametrize("material", MATERIALS)
def test_features_are_16_to_64_px(material):
    """The power outside those wavelengths, coarser or finer, is the smaller part: its median is between them."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    order = np.argsort(frequency, axis=None)
    for seed in range(4):
        grey = texture(material, seed, 256, 256).mean(0).numpy()
        power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        below = np.cumsum(power.flatten()[order]) / power.sum()
        assert 16 <= 1 / frequency.flatten()[order][np.searchsorted(below, 0.5)] <= 64


def test_direction_and_scale_are_drawn_from_the_seed():
    angles = []
    for seed in range(8):
        grey = texture("ripples", seed, 128, 128).mean(0)
        down, right = (grey.diff(dim=d).square().mean() for d in (0, 1))
        angles.append(float(torch.atan2(down, right)))
    assert max(angles) - min(angles) > 0.5


def test_a_textures_mean_and_spread_of_colour_tell_its_material():
    def look(material: str, seed: int) -> torch.Tensor:
        drawn = texture(material, seed, 96, 96)
        return torch.cat([drawn.mean((1, 2)), drawn.std((1, 2))])

    known = torch.stack([torch.stack([look(m, s) for s in range(4)]).mean(0) for m in MATERIALS])
    for i, material in enumerate(MATERIALS):
        assert all(int((known - look(material, s)).norm(dim=1).argmin()) == i for s in range(4, 8))


def test_palettes_are_those_of_the_words():
    assert tuple(PALETTES) == MATERIALS and len(MATERIALS) >= 6


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("sand", 0, 32, 32), r"material: expected one of clouds, .*, got 'sand'"),
        (("clouds", -1, 32, 32), r"seed: expected an integer >= 0, got -1"),
        (("clouds", 0.5, 32, 32), r"seed: expected an integer >= 0, got 0\.5"),
        (("clouds", 0, 0, 32), r"height, width: expected at least 1 px a side, got 0 x 32"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        texture(*call)


def test_the_other_kinds_are_what_they_were():
    """Recorded results belong to these scenes."""

    def line(seed: int, kind: str | None) -> str:
        s = scenes.describe(seed, kind)
        things = [
            (t.shape, t.colour, round(float(t.x), 6), round(float(t.y), 6), round(t.r, 6))
            for t in (*s.before, *s.after)
        ]
        grounds = [
            (b.kind, [round(c, 6) for c in (*b.first, *b.second)], b.photo, b.seed)
            for b in (s.background, s.new_background)
        ]
        return f"{s.kind} {s.prompt} {things} {grounds}"

    starts, kinds = (0, scenes.TRAINING_SEED), (None, *KINDS)
    lines = [line(first + seed, kind) for first in starts for seed in range(20) for kind in kinds]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "aef0f10d80c3c64f3dc6fd320e30ecd32a40b9dc2d21f4b53537b1a5e5bab7b4"


def test_half_of_the_textures_are_backgrounds_and_all_materials_occur():
    described = [scenes.describe(seed, "texture") for seed in range(400)]
    assert 0.4 < sum(scene.place is None for scene in described) / 400 < 0.6
    assert {scene.material for scene in described} == set(MATERIALS)
    assert all(scene.material in scene.prompt for scene in described)
    assert scenes.describe(0, "recolor").material is None
    assert "texture" not in {scenes.describe(seed).kind for seed in range(100)}


def test_region_and_mask_are_where_the_material_is():
    backgrounds = 0
    for seed in range(12):
        case, scene = scenes.sample(seed, 96, "texture"), scenes.describe(seed, "texture")
        source, target = (np.asarray(image, int) for image in (case.source, case.target))
        assert case.material == scene.material and case.region.shape == case.mask.shape == (96, 96)
        assert case.region.any() and not (case.region & ~case.mask).any()
        assert np.abs(source - target).max(-1)[~case.mask].max(initial=0) <= 3
        material = scene.new_background if scene.place is None else scene.after[0]
        whole = texture(case.material, material.seed, 96, 96).permute(1, 2, 0).numpy() * 255
        assert np.abs(target - whole)[case.region].max() <= 1
        backgrounds += scene.place is None
        assert (case.region.mean() > 0.5) == (scene.place is None)
    assert 0 < backgrounds < 12
    assert scenes.sample(0, 64, "recolor").region is None


def test_textures_are_the_same_in_every_batch_and_window():
    described = [scenes.describe(seed, "texture") for seed in range(6)]
    source, target, mask = scenes.draw(described, 64, 96)
    part = scenes.draw(described, 64, 96, torch.tensor([[16, 32, 40, 48]] * 6))
    for got, whole in zip(part[:2], (source, target), strict=True):
        assert torch.allclose(got, whole[:, :, 16:56, 32:80], atol=1e-4)
    assert torch.equal(part[2], mask[:, 16:56, 32:80])
    for i, scene in enumerate(described):
        assert torch.allclose(scenes.draw([scene], 64, 96)[1][0], target[i], atol=1e-5)
        window = torch.tensor([[16, 32, 40, 48]])
        assert torch.equal(scenes.filled(scene, 64, 96, window), scenes.filled(scene, 64, 96)[16:56, 32:80])


def test_fresh_draws_another_right_answer():
    for seed in range(4):
        case = scenes.sample(seed, 64, "texture")
        other, again = scenes.fresh(case, 5), scenes.fresh(case, 5)
        assert other.prompt == case.prompt and other.source.tobytes() == case.source.tobytes()
        assert other.target.tobytes() == again.target.tobytes() != case.target.tobytes()
        assert np.array_equal(other.mask, case.mask) and np.array_equal(other.region, case.region)
        assert other.material == case.material
    with pytest.raises(ValueError, match=r"case: expected the kind texture, .*, got recolor"):
        scenes.fresh(scenes.sample(0, 32, "recolor"), 1)


def test_every_texture_prompt_fits_and_is_understood():
    tokenizer, pooled = (CappedTokenizer.from_pretrained(WEIGHTS / name) for name in ("tokenizer_2", "tokenizer"))
    regions = ["background", *SHAPES, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)]
    prompts = [p.format(region=r, material=m) for p in PHRASES["texture"] for r in regions for m in MATERIALS]
    for reader in (tokenizer, pooled):
        read = reader(prompts).input_ids
        assert max(map(len, read)) <= TEXT_TOKENS and reader.unk_token_id not in {i for ids in read for i in ids}
    assert all(micro.understood(prompt) == (prompt, ()) for prompt in prompts[::7])


@pytest.mark.parametrize(
    ("prompt", "own"),
    [
        ("Fill the background with clouds.", "fill the background with clouds"),
        ("make the background marble", "fill the background with marble"),
        ("cover background in wood grain", "fill the background with wood grain"),
        ("replace the red disc by pebbles", "fill the red circle with pebbles"),
        ("change the background to brush-strokes", "fill the background with brush strokes"),
    ],
)
def test_synonymous_texture_prompts_are_rewritten(prompt, own):
    assert micro.understood(prompt)[0] == own and micro.understood(own) == (own, ())


def test_unknown_materials_are_named():
    with pytest.raises(ValueError, match=r'got "marbel" \(did you mean "marble"\?\)'):
        micro.understood("cover the circle with marbel")
    with pytest.raises(ValueError, match="sentences, such as"):
        micro.understood("cover the circle with red")


RECORDED = [0.753, 0.688, 0.42, 0.46, 0.518, 0.486]  # mean of each material with seed 0, at 64 px


def test_a_new_material_is_added_at_the_end():
    """Its place seeds its random numbers, so that recorded tasks keep theirs."""
    assert textures.MATERIALS[:6] == ("clouds", "marble", "wood grain", "pebbles", "ripples", "brush strokes")
    means = [float(texture(m, 0, 64, 64).mean()) for m in MATERIALS[:6]]
    assert means == pytest.approx(RECORDED, abs=2e-3)


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (2.5, TypeError)])
def test_the_number_of_textures_is_checked(count, error):
    with pytest.raises(error, match=r"^count: expected an integer of at least 0, got"):
        micro.texture_cases(count, 64)

"""The linear probes: their labels describe the scenes, and their losses count what they should."""

import math
from dataclasses import replace

import pytest
import torch

from specedit.micro import scenes
from specedit.micro.render import coverage
from specedit.micro.vocabulary import ALL_KINDS, BACKGROUNDS, COLOURS, KINDS, MATERIALS, PLACES, SHAPES
from training.micro import build, probes


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_labels_are_what_the_prompt_says(kind):
    for seed in range(30):
        scene = scenes.describe(seed, kind)
        labels = probes.prompt_labels(scene)
        assert len(labels) == len(probes.PROMPT_CLASSES)
        assert all(0 <= a < n for a, n in zip(labels, probes.PROMPT_CLASSES, strict=True))
        assert KINDS[labels[0]] == kind
        words = [[*COLOURS], [*SHAPES], [*COLOURS], [*SHAPES], [*PLACES]]
        for answer, names in zip(labels[1:6], words, strict=True):
            if answer:
                assert names[answer - 1] in scene.prompt
        local = kind in ("recolor", "remove", "shape")
        assert bool(labels[2]) == local and bool(labels[3]) == (kind in ("recolor", "add"))
        assert bool(labels[4]) == (kind in ("shape", "add")) and bool(labels[5]) == (kind == "add")
        background, first, second, material = labels[6:]
        assert material == 0
        if kind != "background":
            assert (background, first, second) == (0, 0, 0)
            continue
        name = [*BACKGROUNDS][background - 1]
        asked = BACKGROUNDS[name].format(c1=[*COLOURS][first - 1], c2=[*COLOURS][second - 1])
        assert first and scene.prompt.endswith(asked) and bool(second) == (name != "plain")


def test_labels_of_a_texture_are_its_object_and_its_material():
    for seed in range(30):
        scene = scenes.describe(seed, "texture")
        kind, colour, shape, *between, material = probes.prompt_labels(scene)
        assert ALL_KINDS[kind] == "texture" and scene.prompt.endswith(MATERIALS[material - 1]) and not any(between)
        parts, edited = probes.coverage_labels(scene, (8, 8)), probes.edited_object(scene)
        if scene.place is None:
            assert colour == shape == 0 and not parts.any() and edited == ()
        else:
            assert SHAPES[shape - 1] in scene.prompt and parts.any() and edited == scene.before[:1]
            assert colour == 0 or [*COLOURS][colour - 1] in scene.prompt


def test_token_labels_are_the_objects_drawn_there():
    grid = (8, 16)
    for seed in range(20):
        scene = scenes.describe(seed, "recolor")
        labels = probes.token_labels(scene, grid).unflatten(0, grid)
        assert labels.shape == (*grid, 2) and bool(((labels[..., 0] > 0) == (labels[..., 1] > 0)).all())
        for thing in scene.before:
            label = labels[int(thing.y * grid[0]), int(thing.x * grid[1])].tolist()
            assert label == [1 + [*COLOURS].index(thing.colour), 1 + SHAPES.index(thing.shape)]
        assert (labels == 0).any()


def test_position_features_do_not_depend_on_the_size():
    n = probes.WAVES
    coarse, fine = probes.position_features((2, 3)), probes.position_features((6, 9))
    assert coarse.shape == (6, 2 * n) and fine.shape == (54, 2 * n)
    centres = fine.unflatten(0, (6, 9))[1::3, 1::3].flatten(0, 1)  # of 3 x 3 tokens each
    assert torch.allclose(coarse, centres, atol=1e-6)
    assert float(coarse[5, 0]) == pytest.approx(math.cos(math.pi * 3 / 4))  # first wave of the second of two rows
    assert float(coarse[5, n + 1]) == pytest.approx(math.cos(2 * math.pi * 5 / 6))  # second, third of three columns


def test_losses_read_the_blocks_outputs():
    transformer = build.transformer()
    blocks = (transformer.transformer_blocks[-1], *transformer.single_transformer_blocks[1:4:2])
    asked = probes.Probes(transformer, blocks)
    with torch.no_grad():
        for head in (asked.prompt, asked.thing, asked.place, asked.shown, asked.aim, asked.change, asked.cover):
            head.weight.zero_()
            head.bias.zero_()
        asked.change.bias.fill_(2.0)
        asked.cover.bias.fill_(1.0)
        asked.place.bias.copy_(torch.arange(12.0))
    # A token's centre is near the edited object where that is not in the middle row.
    batch = [s for s in (scenes.describe(seed, "shape") for seed in range(20)) if s.place[1] != 1][:2]
    edited = torch.zeros(2, 6)
    edited[0] = 1.0
    labels = probes.Labels(batch, (2, 3), edited)
    late = transformer.single_transformer_blocks[1]
    for block in blocks:
        for hook in block._forward_hooks.values():
            hook(block, (), (torch.zeros(2, 3, 256), torch.randn(2, 12, 256)))
    weight = torch.tensor([[5.0, 1.0, 1.0, 1.0, 1.0, 3.0]]).expand(2, -1)
    losses = asked.losses(6, labels, torch.tensor([1.0, 0.0]), weight)
    # Heads that know nothing: the entropy of a guess. Only the first sample, all of it edited, counts for `edited`.
    covered = probes.coverage_labels(batch[0], (2, 3)).mean(1)
    guess = ((math.log1p(math.e) - covered) * weight[0]).sum() / weight[0].sum()
    assert float(losses["coverage"]) == pytest.approx(float(guess), rel=1e-5)
    assert float(losses["prompt"]) == pytest.approx(sum(map(math.log, probes.PROMPT_CLASSES)) / 10, rel=1e-5)
    assert float(losses["token"]) == pytest.approx(sum(map(math.log, probes.TOKEN_CLASSES)) / 2, rel=1e-5)
    assert float(losses["edited"]) == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-5)
    missed = (torch.arange(12.0) - probes.position_features((2, 3))).square().mean()
    assert float(losses["position"]) == pytest.approx(float(missed), rel=1e-5)
    offset, near = probes.centre_offsets(batch[0].before[:1], (2, 3))
    assert near.any()
    assert float(losses["edit_offset"]) == pytest.approx(float(offset[near > 0].square().mean()), rel=1e-5)
    offset, near = (torch.cat(part) for part in zip(*(probes.centre_offsets(s.before, (2, 3)) for s in batch)))
    assert float(losses["reference_offset"]) == pytest.approx(float(offset[near > 0].square().mean()), rel=1e-5)
    assert not asked.hidden
    with torch.no_grad():
        for hook in late._forward_hooks.values():
            hook(late, (), (None, torch.randn(2, 12, 256)))
    assert not asked.hidden  # nothing is recorded while sampling


def test_dropped_prompts_do_not_count():
    transformer = build.transformer()
    blocks = (*transformer.transformer_blocks, transformer.single_transformer_blocks[0])
    asked = probes.Probes(transformer, blocks)
    batch = [scenes.describe(seed) for seed in range(3)]
    edited = torch.zeros(3, 6)
    states = torch.randn(3, 12, 256, generator=torch.Generator().manual_seed(0))

    def losses(states, labels, **given):
        for block in blocks:
            for hook in block._forward_hooks.values():
                hook(block, (), (None, states))
        return asked.losses(6, labels, torch.ones(len(states)), torch.ones(len(states), 6), **given)

    some = losses(states, probes.Labels(batch, (2, 3), edited), has_prompt=torch.tensor([True, False, True]))
    alone = losses(states[::2], probes.Labels(batch[::2], (2, 3), edited[::2]))
    whole = losses(states, probes.Labels(batch, (2, 3), edited))
    for name in ("prompt", "edited", "edit_offset", "coverage"):
        assert float(some[name]) == pytest.approx(float(alone[name]), rel=1e-5)
        assert float(some[name]) != pytest.approx(float(whole[name]), rel=1e-5)
    assert torch.equal(some["token"], whole["token"])  # the reference's objects need no prompt


@pytest.mark.parametrize("kind", ["add", "shape", "recolor", "remove", "greyscale"])
def test_coverage_labels_are_the_edited_object_in_the_target(kind):
    scene, grid = scenes.describe(3, kind), (16, 24)
    parts = probes.coverage_labels(scene, grid)
    assert parts.shape == (16 * 24, 16)
    if kind in ("remove", "greyscale"):
        assert not parts.any()
        return
    thing = scene.after[0]
    (whole,) = coverage([thing], 16 * 16, 24 * 16)  # at 16 px a token
    expected = whole.view(16, 4, 4, 24, 4, 4).mean((2, 5)).permute(0, 2, 1, 3).reshape(16 * 24, 16)
    assert (parts - expected).abs().mean() < 0.02 * expected.mean() + 0.01 and parts.sum() > 0
    assert parts.sum() == pytest.approx(float(expected.sum()), rel=0.1)
    centre = int(thing.y * 16) * 24 + int(thing.x * 24)
    assert thing.shape == "ring" or parts[centre].max() == 1


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_coverage_labels_of_a_background_are_its_second_colour(name):
    seed = next(s for s in range(1000) if scenes.describe(s, "background").new_background.kind == name)
    scene = scenes.describe(seed, "background")
    parts = probes.coverage_labels(scene, (8, 12)).view(8, 12, 4, 4).permute(0, 2, 1, 3).reshape(32, 48)
    _, target, _ = scenes.draw([replace(scene, before=(), after=())], 32, 48)
    first, second = (torch.tensor(c).view(3, 1, 1) for c in (scene.new_background.first, scene.new_background.second))
    assert torch.allclose(first + (second - first) * parts, target[0], atol=1e-5)
    assert bool(parts.any()) == (name != "plain")


def test_centre_offsets_lead_to_the_nearest_objects_centre():
    grid = (12, 18)
    rows, columns = (a.flatten() + 0.5 for a in torch.meshgrid(torch.arange(12.0), torch.arange(18.0), indexing="ij"))
    for seed in range(20):
        things = scenes.describe(seed, "remove").before
        offset, near = probes.centre_offsets(things, grid)
        assert offset.shape == (12 * 18, 3) and not offset[near == 0].any()
        radius = (probes.RADIUS + probes.SPREAD * offset[:, 2]) * 12
        middles = torch.stack([columns - offset[:, 0] * radius, rows - offset[:, 1] * radius], 1)[near > 0]
        real = torch.tensor([[t.x * 18, t.y * 12] for t in things])
        apart = (middles[:, None] - real).norm(dim=-1)
        assert float(apart.amin(1).max()) < 1e-3  # each is the middle of one object
        centres = torch.stack([columns, rows], 1)
        reach = torch.tensor([t.r * 12 for t in things])
        distance = (centres[:, None] - real).norm(dim=-1) / reach
        assert torch.equal(near > 0, distance.amin(1) < probes.REACH)
        assert torch.equal(apart.argmin(1), distance.argmin(1)[near > 0])
    assert not probes.centre_offsets((), grid)[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_edited_object_is_from_the_right_image(kind):
    scene = scenes.describe(4, kind)
    got = probes.edited_object(scene)
    if kind in ("background", "greyscale"):
        assert got == ()
    else:
        (thing,) = got
        assert thing in (scene.after if kind == "add" else scene.before)
        assert thing not in (scene.before if kind == "add" else scene.after)

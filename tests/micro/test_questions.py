"""The questions of training: their answers fit the scenes, and they read what they should."""

import math
from dataclasses import replace

import pytest
import torch

from specedit.micro import build, questions, scenes
from specedit.micro.render import coverage
from specedit.micro.vocabulary import BACKGROUNDS, COLOURS, KINDS, PLACES, SHAPES


@pytest.mark.parametrize("kind", KINDS)
def test_said_is_what_the_prompt_says(kind):
    for seed in range(30):
        scene = scenes.describe(seed, kind)
        answers = questions.said(scene)
        assert len(answers) == len(questions.SAID)
        assert all(0 <= a < n for a, n in zip(answers, questions.SAID, strict=True))
        assert KINDS[answers[0]] == kind
        words = [[*COLOURS], [*SHAPES], [*COLOURS], [*SHAPES], [*PLACES]]
        for answer, names in zip(answers[1:6], words, strict=True):
            if answer:
                assert names[answer - 1] in scene.prompt
        local = kind in ("recolor", "remove", "shape")
        assert bool(answers[2]) == local and bool(answers[3]) == (kind in ("recolor", "add"))
        assert bool(answers[4]) == (kind in ("shape", "add")) and bool(answers[5]) == (kind == "add")
        background, first, second = answers[6:]
        if kind != "background":
            assert (background, first, second) == (0, 0, 0)
            continue
        name = [*BACKGROUNDS][background - 1]
        asked = BACKGROUNDS[name].format(c1=[*COLOURS][first - 1], c2=[*COLOURS][second - 1])
        assert first and scene.prompt.endswith(asked) and bool(second) == (name != "plain")


def test_seen_marks_the_objects_where_they_are_drawn():
    grid = (8, 16)
    for seed in range(20):
        scene = scenes.describe(seed, "recolor")
        labels = questions.seen(scene, grid).unflatten(0, grid)
        assert labels.shape == (*grid, 2) and bool(((labels[..., 0] > 0) == (labels[..., 1] > 0)).all())
        for thing in scene.before:
            label = labels[int(thing.y * grid[0]), int(thing.x * grid[1])].tolist()
            assert label == [1 + [*COLOURS].index(thing.colour), 1 + SHAPES.index(thing.shape)]
        assert (labels == 0).any()


def test_where_is_the_same_place_at_any_size():
    n = questions.WAVES
    coarse, fine = questions.where((2, 3)), questions.where((6, 9))
    assert coarse.shape == (6, 2 * n) and fine.shape == (54, 2 * n)
    centres = fine.unflatten(0, (6, 9))[1::3, 1::3].flatten(0, 1)  # of 3 x 3 tokens each
    assert torch.allclose(coarse, centres, atol=1e-6)
    assert float(coarse[5, 0]) == pytest.approx(math.cos(math.pi * 3 / 4))  # first wave of the second of two rows
    assert float(coarse[5, n + 1]) == pytest.approx(math.cos(2 * math.pi * 5 / 6))  # second, third of three columns


def test_losses_are_those_of_what_the_blocks_put_out():
    transformer = build.transformer()
    blocks = (transformer.transformer_blocks[-1], *transformer.single_transformer_blocks[1:4:2])
    asked = questions.Questions(transformer, blocks)
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
    answers = questions.Answers(batch, (2, 3), edited)
    late = transformer.single_transformer_blocks[1]
    for block in blocks:
        for hook in block._forward_hooks.values():
            hook(block, (), (torch.zeros(2, 3, 256), torch.randn(2, 12, 256)))
    weight = torch.tensor([[5.0, 1.0, 1.0, 1.0, 1.0, 3.0]]).expand(2, -1)
    losses = asked.losses(6, answers, torch.tensor([1.0, 0.0]), weight)
    # Heads that know nothing: the entropy of a guess. Only the first sample, all of it edited, counts for `find`.
    covered = questions.outline(batch[0], (2, 3)).mean(1)
    guess = ((math.log1p(math.e) - covered) * weight[0]).sum() / weight[0].sum()
    assert float(losses["cover"]) == pytest.approx(float(guess), rel=1e-5)
    assert float(losses["said"]) == pytest.approx(sum(map(math.log, questions.SAID)) / 9, rel=1e-5)
    assert float(losses["seen"]) == pytest.approx(sum(map(math.log, questions.SEEN)) / 2, rel=1e-5)
    assert float(losses["find"]) == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-5)
    missed = (torch.arange(12.0) - questions.where((2, 3))).square().mean()
    assert float(losses["where"]) == pytest.approx(float(missed), rel=1e-5)
    offset, near = questions.offsets(batch[0].before[:1], (2, 3))
    assert near.any()
    assert float(losses["aim"]) == pytest.approx(float(offset[near > 0].square().mean()), rel=1e-5)
    offset, near = (torch.cat(part) for part in zip(*(questions.offsets(s.before, (2, 3)) for s in batch)))
    assert float(losses["shown"]) == pytest.approx(float(offset[near > 0].square().mean()), rel=1e-5)
    assert not asked.hidden
    with torch.no_grad():
        for hook in late._forward_hooks.values():
            hook(late, (), (None, torch.randn(2, 12, 256)))
    assert not asked.hidden  # sampling leaves nothing behind


def test_samples_without_a_prompt_are_not_asked_about_it():
    transformer = build.transformer()
    blocks = (*transformer.transformer_blocks, transformer.single_transformer_blocks[0])
    asked = questions.Questions(transformer, blocks)
    batch = [scenes.describe(seed) for seed in range(3)]
    edited = torch.zeros(3, 6)
    states = torch.randn(3, 12, 256, generator=torch.Generator().manual_seed(0))

    def losses(states, answers, **told):
        for block in blocks:
            for hook in block._forward_hooks.values():
                hook(block, (), (None, states))
        return asked.losses(6, answers, torch.ones(len(states)), torch.ones(len(states), 6), **told)

    some = losses(states, questions.Answers(batch, (2, 3), edited), told=torch.tensor([True, False, True]))
    alone = losses(states[::2], questions.Answers(batch[::2], (2, 3), edited[::2]))
    whole = losses(states, questions.Answers(batch, (2, 3), edited))
    for name in ("said", "find", "aim", "cover"):
        assert float(some[name]) == pytest.approx(float(alone[name]), rel=1e-5)
        assert float(some[name]) != pytest.approx(float(whole[name]), rel=1e-5)
    assert torch.equal(some["seen"], whole["seen"])  # what a reference shows needs no prompt


@pytest.mark.parametrize("kind", ["add", "shape", "recolor", "remove", "greyscale"])
def test_an_outline_is_where_the_edited_object_is_in_the_target(kind):
    scene, grid = scenes.describe(3, kind), (16, 24)
    parts = questions.outline(scene, grid)
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
def test_the_outline_of_a_new_background_is_where_it_has_its_second_colour(name):
    seed = next(s for s in range(1000) if scenes.describe(s, "background").new_background.kind == name)
    scene = scenes.describe(seed, "background")
    parts = questions.outline(scene, (8, 12)).view(8, 12, 4, 4).permute(0, 2, 1, 3).reshape(32, 48)
    _, target, _ = scenes.draw([replace(scene, before=(), after=())], 32, 48)
    first, second = (torch.tensor(c).view(3, 1, 1) for c in (scene.new_background.first, scene.new_background.second))
    assert torch.allclose(first + (second - first) * parts, target[0], atol=1e-5)
    assert bool(parts.any()) == (name != "plain")


def test_offsets_lead_back_to_the_middle_of_the_nearest_object():
    grid = (12, 18)
    rows, columns = (a.flatten() + 0.5 for a in torch.meshgrid(torch.arange(12.0), torch.arange(18.0), indexing="ij"))
    for seed in range(20):
        things = scenes.describe(seed, "remove").before
        offset, near = questions.offsets(things, grid)
        assert offset.shape == (12 * 18, 3) and not offset[near == 0].any()
        radius = (questions.RADIUS + questions.SPREAD * offset[:, 2]) * 12
        middles = torch.stack([columns - offset[:, 0] * radius, rows - offset[:, 1] * radius], 1)[near > 0]
        real = torch.tensor([[t.x * 18, t.y * 12] for t in things])
        apart = (middles[:, None] - real).norm(dim=-1)
        assert float(apart.amin(1).max()) < 1e-3  # each is the middle of one object
        centres = torch.stack([columns, rows], 1)
        reach = torch.tensor([t.r * 12 for t in things])
        distance = (centres[:, None] - real).norm(dim=-1) / reach
        assert torch.equal(near > 0, distance.amin(1) < questions.REACH)
        assert torch.equal(apart.argmin(1), distance.argmin(1)[near > 0])
    assert not questions.offsets((), grid)[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_edited_object_is_where_it_was_or_will_be(kind):
    scene = scenes.describe(4, kind)
    got = questions.edited_object(scene)
    if kind in ("background", "greyscale"):
        assert got == ()
    else:
        (thing,) = got
        assert thing in (scene.after if kind == "add" else scene.before)
        assert thing not in (scene.before if kind == "add" else scene.after)

"""Training on textures: batches, noise levels, and where they are focused."""

import itertools
import random

import pytest
import torch

from specedit.micro import scenes
from training.micro import build, families, loop, probes, train_editor


def textures(count: int) -> list[scenes.Scene]:
    return [scenes.describe(seed, "texture") for seed in loop.seeds(0, count)]


@pytest.mark.thorough
def test_a_batch_with_textures_has_a_finite_loss_with_and_without_probes():
    torch.manual_seed(0)
    pipe = build.kontext()
    tasks = [*textures(3), scenes.describe(scenes.TRAINING_SEED, "background")]
    batch = train_editor.encode(pipe, tasks, (64, 64), "cpu")
    assert batch.labels.textured.tolist() == [True] * 3 + [False]
    read = probes.Probes(pipe.transformer, families.family_of(pipe).probed_blocks(pipe.transformer))
    with torch.enable_grad():
        losses = train_editor.editor_loss(pipe, batch, "cpu", probes=read)
    assert set(losses) == {"flow", *train_editor.PROBE_WEIGHTS, "total"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert torch.isfinite(train_editor.editor_loss(pipe, batch, "cpu")["total"])


def test_textures_have_every_noise_level_whatever_the_share_of_high_ones(monkeypatch):
    pipe, asked = build.kontext(), []
    batch = train_editor.encode(pipe, [*textures(2), scenes.describe(scenes.TRAINING_SEED, "add")], (64, 64), "cpu")
    real = train_editor.noise_levels
    monkeypatch.setattr(train_editor, "noise_levels", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    train_editor.editor_loss(pipe, batch, "cpu", high=0.7)
    few = train_editor.TEXTURE_HIGH
    assert asked[0].tolist() == pytest.approx([few, few, 0.7])
    levels = real(4000, 64, torch.full((4000,), few), pipe.scheduler.config)
    shares = torch.histc(levels, 5, 0, 1) / 4000
    assert float(shares.min()) > 0.05 and float(shares.max()) < 0.5


def test_focused_textures_are_objects():
    drawn = train_editor.draw_tasks(
        iter(loop.seeds(0, 10**6)), 40, random.Random(0), place=(1, 1), practise=["texture"]
    )
    assert {task.place for task in drawn if task.kind == "texture"} == {(1, 1)}


def test_training_draws_textures_and_practises_them():
    seeds = itertools.count(scenes.TRAINING_SEED)
    for practise, low, high in (((), 0.1, 0.3), (("texture",), 0.5, 0.7)):
        drawn = train_editor.draw_tasks(seeds, 200, random.Random(0), practise=practise)
        assert low < sum(task.kind == "texture" for task in drawn) / 200 < high

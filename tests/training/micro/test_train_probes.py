"""The first blocks are trained by linear probes; later blocks are not touched."""

import copy

import pytest
import torch

from specedit.micro import kontext, scenes
from specedit.micro.loading import WEIGHTS
from training.micro import families, loop, neighbour_block, train, train_editor, train_probes
from training.micro.probes import PROMPT_CLASSES, Probes
from training.micro.train_editor import PROBE_WEIGHTS, encode


def untrained(name):
    torch.manual_seed(0)
    pipe = families.family_named(name).build(0)
    return pipe, Probes(pipe.transformer, families.family_of(pipe).probed_blocks(pipe.transformer))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_probe_loss_is_learned(name, few_blocks):
    pipe, probes = untrained(name)
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 4)], (64, 64), "cpu")
    modules = [pipe.transformer, *families.family_of(pipe).text_modules(pipe), probes]
    parameters = [p.requires_grad_(True) for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    losses = []
    for _ in range(6):
        loss = sum(train_probes.probe_loss(pipe, probes, batch, "cpu").values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert not probes.hidden  # later blocks did not run


@pytest.mark.thorough
def test_only_first_truncates_and_restores():
    pipe, _ = untrained("qwen")
    model, seen = pipe.transformer, []
    blocks = model.transformer_blocks
    hooks = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(blocks)]
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 2)], (64, 64), "cpu")
    call = (batch.target, batch.source, batch.grid, torch.tensor([0.9, 0.5]))
    with torch.no_grad():
        features = families.family_of(pipe).text(pipe, batch.prompts, batch.vision, "cpu")
        whole = families.family_of(pipe).velocity(pipe, *call, features)
        with train_probes.only_first(model):
            families.family_of(pipe).velocity(pipe, *call, features)
        again = families.family_of(pipe).velocity(pipe, *call, features)
    assert seen == [*range(6), 0, 1, *range(6)]
    assert torch.equal(whole, again) and model.transformer_blocks is blocks
    with pytest.raises(RuntimeError), train_probes.only_first(model):
        raise RuntimeError
    assert model.transformer_blocks is blocks
    for hook in hooks:
        hook.remove()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_only_text_encoders_and_first_blocks_change(name, tmp_path, few_tasks):
    pipe, probes = untrained(name)
    texts = families.family_of(pipe).text_modules(pipe)
    before = [copy.deepcopy(module.state_dict()) for module in (pipe.transformer, *texts, pipe.vae, probes)]
    settings = loop.Settings(tmp_path, steps=2, probe_minutes=10.0, largest=64)
    train_probes.train_probes(pipe, probes, settings, loop.Log(tmp_path / "log.json"))
    changed = [
        {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
        for module, old in zip((pipe.transformer, *texts, pipe.vae, probes), before, strict=True)
    ]
    later = tuple(f"transformer_blocks.{i}." for i in range(2, 6)) + (
        "single_transformer_blocks",
        "proj_out",
        "norm_out",
    )
    assert any(key.startswith("transformer_blocks.0.") for key in changed[0])
    assert not any(key.startswith(later) for key in changed[0])
    assert all(changed[1 : 1 + len(texts)]) and not changed[-2]
    assert {key.split(".")[0] for key in changed[-1]} <= {"norms", "place", "prompt", "shown", "thing"} and changed[-1]
    assert not any(p.requires_grad for p in pipe.transformer.parameters())


# Nothing here depends on the family but what the tests above try with both.
@pytest.mark.thorough
def test_probes_are_first_fitted_to_a_trained_editor(tmp_path, few_tasks, at_full_rate, monkeypatch):
    monkeypatch.setattr(loop, "LOGGED", 10)
    monkeypatch.setattr(train_probes, "PROBE_SHARE", 1.0)  # no time for the second part
    pipe, probes = untrained("qwen")
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 8)], (64, 64), "cpu")

    def loss():
        torch.manual_seed(0)  # the same noise
        return sum(float(part.detach()) for part in train_probes.full_probe_loss(pipe, probes, batch, "cpu").values())

    editor = (pipe.transformer, *families.family_of(pipe).text_modules(pipe), pipe.vae)
    before, first = [copy.deepcopy(module.state_dict()) for module in editor], loss()
    log = loop.Log(tmp_path / "log.json")
    settings = loop.Settings(tmp_path, steps=10, probe_minutes=10.0, largest=64, start=tmp_path)
    train_probes.train_probes(pipe, probes, settings, log)
    for module, old in zip(editor, before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in module.state_dict().items())
    assert loss() < 0.8 * first
    assert [set(row) for row in log.rows] == [{"part", "step", "seconds", *PROBE_WEIGHTS}]
    assert not any(p.requires_grad for module in (*editor, probes) for p in module.parameters())


@pytest.mark.thorough
def test_first_blocks_then_learn_and_stay_near(tmp_path, few_tasks, at_full_rate, monkeypatch):
    monkeypatch.setattr(loop, "LOGGED", 8)
    monkeypatch.setattr(train_probes, "PROBE_SHARE", 0.0)
    pipe, probes = untrained("kontext")
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 8)], (64, 64), "cpu")

    def prompt_loss():
        torch.manual_seed(0)  # the same noise
        return float(train_probes.probe_loss(pipe, probes, batch, "cpu")["prompt"].detach())

    texts = families.family_of(pipe).text_modules(pipe)
    before = [copy.deepcopy(module.state_dict()) for module in (pipe.transformer, *texts, pipe.vae)]
    first = prompt_loss()
    log = loop.Log(tmp_path / "log.json")
    settings = loop.Settings(tmp_path, steps=8, probe_minutes=10.0, text_rate=2e-3, largest=64, start=tmp_path)
    train_probes.train_probes(pipe, probes, settings, log)
    assert prompt_loss() < 0.8 * first
    (row,) = log.rows
    assert set(row) == {"part", "step", "seconds", "position", "prompt", "token", "reference_offset", "drift"}
    assert row["part"] == "probe_distil"
    assert 0 < row["drift"] < 2 * train_probes.DISTIL_WEIGHT  # each of the two by less than its variance
    changed = [
        {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
        for module, old in zip((pipe.transformer, *texts, pipe.vae), before, strict=True)
    ]
    assert all(changed[:-1]) and not changed[-1]
    later = tuple(f"transformer_blocks.{i}." for i in range(2, 6)) + ("single_transformer_blocks", "proj_out")
    assert not any(key.startswith(later) for key in changed[0])
    assert not any(p.requires_grad for module in (pipe.transformer, *texts, probes) for p in module.parameters())


@pytest.mark.thorough
def test_drift_of_an_unchanged_editor_is_zero_and_prompt_losses_are_summed(few_blocks):
    pipe, probes = untrained("kontext")
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 4)], (64, 64), "cpu")
    old = copy.deepcopy(pipe)

    def losses(loss, *others):
        torch.manual_seed(0)
        return {name: float(one.detach()) for name, one in loss(pipe, probes, batch, "cpu", *others).items()}

    distilled, plain = losses(train_probes.probe_distil_loss, old), losses(train_probes.probe_loss)
    assert distilled["drift"] == 0.0
    assert distilled["prompt"] == pytest.approx(len(PROMPT_CLASSES) * plain["prompt"], rel=0.05)  # another guidance
    with torch.no_grad():
        pipe.transformer.x_embedder.weight.mul_(1.5)
    assert losses(train_probes.probe_distil_loss, old)["drift"] > 0.0


@pytest.mark.thorough
def test_probes_are_fitted_at_high_noise(few_blocks, monkeypatch):
    pipe, probes = untrained("kontext")
    batch = encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 8)], (64, 64), "cpu")
    real, levels = train_editor.noise_levels, []
    monkeypatch.setattr(train_editor, "noise_levels", lambda *a, **k: levels.append(real(*a, **k)) or levels[-1])
    train_probes.full_probe_loss(pipe, probes, batch, "cpu")
    assert len(levels) == 1 and levels[0].shape == (8,) and bool((levels[0] >= train_editor.HIGH).all())


def test_zero_minutes_change_nothing(tmp_path):
    pipe, probes = untrained("kontext")
    before = copy.deepcopy(pipe.transformer.state_dict())
    settings = loop.Settings(tmp_path, probe_minutes=0.0, largest=64)
    train_probes.train_probes(pipe, probes, settings, loop.Log(tmp_path / "log.json"))
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def test_images_are_small_and_seeds_are_separate(tmp_path, monkeypatch):
    pipe, probes = untrained("kontext")
    seen = []

    def batches(pipe, settings, clock, start):
        seen.append((settings.largest, start))
        return iter(())

    monkeypatch.setattr(train_probes, "batches", batches)
    for largest in (512, 64):
        settings = loop.Settings(tmp_path, largest=largest, steps=0)
        train_probes.train_probes(pipe, probes, settings, loop.Log(tmp_path / "log.json"))
    assert [largest for largest, _ in seen] == [128, 64]
    assert all(0 < start != 1 << 20 for _, start in seen)  # where train_link's tasks begin


@pytest.mark.thorough
def test_probes_are_kept_for_the_whole_training(tmp_path, few_tasks, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train_vae", lambda *_: None)
    monkeypatch.setattr(train, "train_text", lambda *_: calls.append("text"))
    monkeypatch.setattr(train, "train_probes", lambda _pipe, probes, *_: calls.append(probes))
    monkeypatch.setattr(train, "train_editor", lambda _pipe, probes, *_: calls.append(probes))
    settings = loop.Settings(tmp_path, largest=64)
    train.train(settings)
    assert calls[0] == "text" and isinstance(calls[1], Probes) and calls[1] is calls[2]
    (tmp_path / "editor.pt").touch()  # a run to be resumed
    calls.clear()
    train.train(settings)
    assert len(calls) == 1  # the probes' own part runs once


@pytest.mark.thorough
def test_continued_training_skips_the_text_part(tmp_path, monkeypatch):
    calls = []
    for part in ("text", "probes", "editor"):
        monkeypatch.setattr(train, f"train_{part}", lambda *_, part=part: calls.append(part))
    monkeypatch.setattr(neighbour_block, "train_neighbour_block", lambda *_: calls.append("neighbour_block"))
    start = WEIGHTS / "kontext"
    train.train(loop.Settings(tmp_path, largest=64, start=start))
    lacks = neighbour_block.lacks_neighbour_block(kontext.read(start))
    assert calls == [*(["neighbour_block"] if lacks else []), "probes", "editor"]

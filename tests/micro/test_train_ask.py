"""The first blocks learn to tell picture tokens what a prompt says; nothing behind them is touched."""

import copy

import pytest
import torch

from specedit.micro import build, family, order, scenes, train, train_ask, train_editor, training
from specedit.micro.load import WEIGHTS
from specedit.micro.questions import SAID, Questions
from specedit.micro.train_editor import ASK, encode


def untrained(name):
    torch.manual_seed(0)
    pipe = family.named(name).build(0)
    return pipe, Questions(pipe.transformer, family.of(pipe).asked_blocks(pipe.transformer))


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_it_is_learned(name):
    pipe, questions = untrained(name)
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 16)], (64, 64), "cpu")
    modules = [pipe.transformer, *family.of(pipe).text_modules(pipe), questions]
    parameters = [p.requires_grad_(True) for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for _ in range(25):
        loss = sum(train_ask.ask_loss(pipe, questions, batch, "cpu").values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert not questions.hidden  # the blocks behind were not run, so nothing of them is left


def test_only_the_first_blocks_run_inside_and_all_again_outside():
    pipe, _ = untrained("qwen")
    model, seen = pipe.transformer, []
    blocks = model.transformer_blocks
    hooks = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(blocks)]
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 2)], (64, 64), "cpu")
    call = (batch.target, batch.source, batch.grid, torch.tensor([0.9, 0.5]))
    with torch.no_grad():
        features = family.of(pipe).text(pipe, batch.prompts, batch.seen, "cpu")
        whole = family.of(pipe).velocity(pipe, *call, features)
        with train_ask.only_first(model):
            family.of(pipe).velocity(pipe, *call, features)
        again = family.of(pipe).velocity(pipe, *call, features)
    assert seen == [*range(6), 0, 1, *range(6)]
    assert torch.equal(whole, again) and model.transformer_blocks is blocks
    with pytest.raises(RuntimeError), train_ask.only_first(model):
        raise RuntimeError
    assert model.transformer_blocks is blocks
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_only_words_and_first_blocks_learn(name, tmp_path, few_tasks):
    pipe, questions = untrained(name)
    texts = family.of(pipe).text_modules(pipe)
    before = [copy.deepcopy(module.state_dict()) for module in (pipe.transformer, *texts, pipe.vae, questions)]
    settings = training.Settings(tmp_path, steps=3, ask_minutes=10.0, largest=64)
    train_ask.train_ask(pipe, questions, settings, training.Log(tmp_path / "log.json"))
    changed = [
        {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
        for module, old in zip((pipe.transformer, *texts, pipe.vae, questions), before, strict=True)
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


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_of_an_editor_to_go_on_from_the_readings_learn_first_and_alone(name, tmp_path, few_tasks, monkeypatch):
    monkeypatch.setattr(train_ask, "READING_SHARE", 1.0)  # and no time for what comes after
    pipe, questions = untrained(name)
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 16)], (64, 64), "cpu")

    def loss():
        torch.manual_seed(0)  # the same noise
        return sum(float(part.detach()) for part in train_ask.reading_loss(pipe, questions, batch, "cpu").values())

    editor = (pipe.transformer, *family.of(pipe).text_modules(pipe), pipe.vae)
    before, first = [copy.deepcopy(module.state_dict()) for module in editor], loss()
    log = training.Log(tmp_path / "log.json")
    settings = training.Settings(tmp_path, steps=50, ask_minutes=10.0, largest=64, start=tmp_path)
    train_ask.train_ask(pipe, questions, settings, log)
    for module, old in zip(editor, before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in module.state_dict().items())
    assert loss() < 0.8 * first
    assert [set(row) for row in log.rows] == [{"part", "step", "seconds", *ASK}]
    assert not any(p.requires_grad for module in (*editor, questions) for p in module.parameters())


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_then_the_first_blocks_learn_to_say_more_and_stay_near(name, tmp_path, few_tasks, monkeypatch):
    monkeypatch.setattr(train_ask, "READING_SHARE", 0.0)
    pipe, questions = untrained(name)
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 16)], (64, 64), "cpu")

    def said():
        torch.manual_seed(0)  # the same noise
        return float(train_ask.ask_loss(pipe, questions, batch, "cpu")["said"].detach())

    texts = family.of(pipe).text_modules(pipe)
    before, first = [copy.deepcopy(module.state_dict()) for module in (pipe.transformer, *texts, pipe.vae)], said()
    log = training.Log(tmp_path / "log.json")
    settings = training.Settings(tmp_path, steps=50, ask_minutes=10.0, largest=64, start=tmp_path)
    train_ask.train_ask(pipe, questions, settings, log)
    assert said() < 0.8 * first
    (row,) = log.rows
    assert set(row) == {"part", "step", "seconds", "where", "said", "seen", "shown", "moved"} and row["part"] == "heed"
    assert 0 < row["moved"] < 2 * train_ask.NEAR  # each of the two by less than its variance
    changed = [
        {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
        for module, old in zip((pipe.transformer, *texts, pipe.vae), before, strict=True)
    ]
    assert all(changed[:-1]) and not changed[-1]
    later = tuple(f"transformer_blocks.{i}." for i in range(2, 6)) + ("single_transformer_blocks", "proj_out")
    assert not any(key.startswith(later) for key in changed[0])
    assert not any(p.requires_grad for module in (pipe.transformer, *texts, questions) for p in module.parameters())


def test_what_has_not_changed_is_as_near_as_can_be_and_every_answer_counts_whole():
    pipe, questions = untrained("kontext")
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 4)], (64, 64), "cpu")
    old = copy.deepcopy(pipe)

    def losses(loss, *others):
        torch.manual_seed(0)
        return {name: float(one.detach()) for name, one in loss(pipe, questions, batch, "cpu", *others).items()}

    heeded, asked = losses(train_ask.heed_loss, old), losses(train_ask.ask_loss)
    assert heeded["moved"] == 0.0
    assert heeded["said"] == pytest.approx(len(SAID) * asked["said"], rel=0.05)  # another guidance
    with torch.no_grad():
        pipe.transformer.x_embedder.weight.mul_(1.5)
    assert losses(train_ask.heed_loss, old)["moved"] > 0.0


def test_the_readings_are_asked_where_the_target_does_not_show(monkeypatch):
    pipe, questions = untrained("kontext")
    batch = encode(pipe, [scenes.describe(s) for s in training.seeds(0, 32)], (64, 64), "cpu")
    real, levels = train_editor.noise_levels, []
    monkeypatch.setattr(train_editor, "noise_levels", lambda *a, **k: levels.append(real(*a, **k)) or levels[-1])
    train_ask.reading_loss(pipe, questions, batch, "cpu")
    assert len(levels) == 1 and levels[0].shape == (32,) and bool((levels[0] >= train_editor.HIGH).all())


def test_no_time_no_change(tmp_path):
    pipe, questions = untrained("kontext")
    before = copy.deepcopy(pipe.transformer.state_dict())
    settings = training.Settings(tmp_path, ask_minutes=0.0, largest=64)
    train_ask.train_ask(pipe, questions, settings, training.Log(tmp_path / "log.json"))
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def test_pictures_are_small_and_their_tasks_are_seen_nowhere_else(tmp_path, monkeypatch):
    pipe, questions = untrained("kontext")
    seen = []

    def batches(pipe, settings, clock, start):
        seen.append((settings.largest, start))
        return iter(())

    monkeypatch.setattr(train_ask, "batches", batches)
    for largest in (512, 64):
        settings = training.Settings(tmp_path, largest=largest, steps=0)
        train_ask.train_ask(pipe, questions, settings, training.Log(tmp_path / "log.json"))
    assert [largest for largest, _ in seen] == [128, 64]
    assert all(0 < start != 1 << 20 for _, start in seen)  # where train_link's tasks begin


def test_the_heads_go_on_into_the_training_of_the_whole(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train_vae", lambda *_: None)
    monkeypatch.setattr(train, "train_text", lambda *_: calls.append("text"))
    monkeypatch.setattr(train, "train_ask", lambda _pipe, questions, *_: calls.append(questions))
    monkeypatch.setattr(train, "train_editor", lambda _pipe, questions, *_: calls.append(questions))
    settings = training.Settings(tmp_path, largest=64)
    train.train(settings)
    assert calls[0] == "text" and isinstance(calls[1], Questions) and calls[1] is calls[2]
    (tmp_path / "editor.pt").touch()  # a run to be resumed
    calls.clear()
    train.train(settings)
    assert len(calls) == 1  # asked beforehand once only


def test_who_goes_on_keeps_its_words(tmp_path, monkeypatch):
    calls = []
    for part in ("text", "ask", "editor"):
        monkeypatch.setattr(train, f"train_{part}", lambda *_, part=part: calls.append(part))
    monkeypatch.setattr(order, "train_order", lambda *_: calls.append("order"))
    start = WEIGHTS / "kontext"
    train.train(training.Settings(tmp_path, largest=64, start=start))
    lacks = order.shallow(build.load(start))
    assert calls == [*(["order"] if lacks else []), "ask", "editor"]

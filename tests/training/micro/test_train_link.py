"""Distillation of the Kontext editor into a Qwen editor that inherited its blocks."""

import copy

import pytest
import torch
from torch import nn

from specedit.micro import scenes
from training.micro import (
    build,
    build_qwen,
    family_kontext,
    family_qwen,
    inherit,
    landmarks,
    loop,
    train_editor,
    train_link,
)
from training.micro.probes import Probes
from training.micro.train_editor import encode


@pytest.fixture(scope="module")
def teacher():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BLOCKS", (2, 3))
        pipe = build.kontext(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as initialised, its blocks are the identity
        for module in pipe.transformer.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                module.weight.copy_(0.05 * torch.randn(module.weight.shape, generator=generator))
        # Make the output depend on the prompt.
        pipe.transformer.context_embedder.weight.mul_(3.0)
    landmarks.add_landmarks(pipe)
    return pipe


@pytest.fixture
def student(teacher, few_blocks):
    pipe = build_qwen.qwen(0)
    inherit.inherit_transformer(pipe, teacher)
    return pipe


def probes_of(pipe):
    return Probes(pipe.transformer, family_qwen.QWEN.probed_blocks(pipe.transformer))


@pytest.fixture(scope="module")
def batch(teacher):
    return encode(teacher, [scenes.describe(s) for s in loop.seeds(0, 4)], (64, 64), "cpu")


@pytest.mark.thorough
def test_states_are_recorded_and_hooks_removed(student, teacher):
    batch = encode(student, [scenes.describe(s) for s in loop.seeds(0, 2)], (64, 64), "cpu")
    pairs = inherit.block_pairs(student.transformer, teacher.transformer)
    model, family = student.transformer, train_link.family_of(student)
    call = (batch.target, batch.source, batch.grid, torch.tensor([0.9, 0.5]))
    with torch.no_grad(), train_link.recorded_states([ours for ours, _ in pairs]) as states:
        family.velocity(student, *call, family.text(student, batch.prompts, batch.vision, "cpu"))
        words = family_kontext.text(teacher, batch.prompts, None, "cpu")
        with train_link.recorded_states([theirs for _, theirs in pairs]) as wanted:
            family_kontext.velocity_at(teacher, *call, words, torch.ones(2))
    assert [s.shape for s in states] == [s.shape for s in wanted] == [(2, 32, 256)] * 4  # target and reference
    with pytest.raises(RuntimeError), train_link.recorded_states(list(model.transformer_blocks)):
        raise RuntimeError
    blocks = [*model.transformer_blocks, *(theirs for _, theirs in pairs)]
    assert not any(block._forward_hooks for block in blocks)


def test_error_is_normalised_by_each_channels_variance():
    torch.manual_seed(0)
    wanted = torch.randn(2, 500, 3) * torch.tensor([1.0, 10.0, 0.0]) + 7
    off = torch.tensor([0.5, 5.0, 0.0])
    weight = torch.ones(2, 500)
    assert train_link.normalised_mse(wanted, wanted, weight) == 0
    got = train_link.normalised_mse(wanted + off, wanted, weight)
    assert torch.allclose(got, torch.tensor((0.25 + 0.25) / 3), rtol=0.1)
    weight[0] = 0  # tokens without weight do not count
    far = wanted + off
    far[0] += 1e3
    assert torch.allclose(train_link.normalised_mse(far, wanted, weight), got, rtol=1e-4)


@pytest.mark.thorough
def test_loss_of_the_teacher_itself_is_zero(student, teacher, batch, monkeypatch):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        parts = train_link.link_loss(student, teacher, batch, "cpu")
        losses.append(torch.stack(list(parts.values())))
    assert torch.equal(*losses) and bool((losses[0] > 0).all())
    torch.manual_seed(0)
    less = train_link.link_loss(student, teacher, batch, "cpu", hints=0.25)
    assert less["total"] == 0.25 * parts["states"] + parts["velocity"] < parts["total"]

    class Echo:  # the teacher in the student's place
        transformer, scheduler = teacher.transformer, student.scheduler

    def velocity(pipe, x, source, grid, sigma, words, at):
        guidance = torch.full_like(sigma, inherit.GUIDANCE)
        return family_kontext.velocity_at(teacher, x, source, grid, sigma, words, guidance, at)

    def text(pipe, prompts, vision, device):
        return family_kontext.text(teacher, prompts, None, device)

    family = type("family", (), {"text": staticmethod(text), "velocity": staticmethod(velocity), "empty_prompts": 0.0})
    monkeypatch.setattr(train_link, "family_of", lambda pipe: family)
    pairs = inherit.block_pairs(student.transformer, teacher.transformer)
    monkeypatch.setattr(train_link, "block_pairs", lambda *_: [(theirs, theirs) for _, theirs in pairs])
    for part in (batch, batch.select(torch.tensor([1, 6, 7]))):
        parts = train_link.link_loss(Echo, teacher, part, "cpu")
        assert all(loss == 0 for loss in parts.values())
    has_prompt = torch.tensor([True] + [False] * 3)
    monkeypatch.setattr(train_link, "drop_prompts", lambda prompts, *_, **__: ([prompts[0], *[" "] * 3], has_prompt))
    parts = train_link.link_loss(Echo, teacher, batch, "cpu")
    assert parts["states"] == 0 and parts["velocity"] > 0  # without a prompt the true velocity counts


@pytest.mark.thorough
def test_all_but_the_autoencoder_is_trained_and_the_teacher_frozen(student, teacher, tmp_path, few_tasks):
    names = ("transformer", "text_encoder", "vae")
    before = {name: copy.deepcopy(getattr(student, name).state_dict()) for name in names}
    known = copy.deepcopy(teacher.transformer.state_dict())
    settings = loop.Settings(tmp_path, steps=1, link_minutes=10.0, largest=64)
    train_link.train_link(student, teacher, probes_of(student), settings, loop.Log(tmp_path / "log.json"))
    changed = {
        f"{part}.{name}" for part, old in before.items() for name, value in getattr(student, part).state_dict().items()
        if not torch.equal(value, old[name])
    }  # fmt: skip
    for name in ("txt_in", "transformer_blocks.0.attn.to_q", "transformer_blocks.3.img_mlp.net.2", "proj_out"):
        assert f"transformer.{name}.weight" in changed
    assert any(name.startswith("text_encoder.") for name in changed) and not any(n.startswith("vae.") for n in changed)
    assert all(torch.equal(value, known[name]) for name, value in teacher.transformer.state_dict().items())
    assert not any(p.requires_grad for p in student.transformer.parameters())
    assert (tmp_path / "editor" / "model_index.json").exists()
    settings.steps = 2  # goes on
    train_link.train_link(student, teacher, probes_of(student), settings, loop.Log(tmp_path / "log.json"))
    assert torch.load(tmp_path / "link.pt", weights_only=True)["step"] == 2


@pytest.mark.thorough
@pytest.mark.parametrize("ask", [False, True])
def test_link_loss_is_learned(student, teacher, batch, ask):
    probes = probes_of(student) if ask else None
    modules: list[nn.Module] = [student.transformer, student.text_encoder, *([probes] if ask else [])]
    for module in modules:
        module.requires_grad_(True)
    optimizer = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=5e-4)
    # An untrained editor's states hardly depend on its prompts: beside the probes they are not what falls.
    losses = {name: [] for name in ("velocity", "total", "prompt" if ask else "states")}
    for _ in range(6):
        torch.manual_seed(0)
        parts = train_link.link_loss(student, teacher, batch, "cpu", probes=probes)
        optimizer.zero_grad()
        parts["total"].backward()
        optimizer.step()
        for name, values in losses.items():
            values.append(float(parts[name].detach()))
    assert all(values[-1] < 0.8 * values[0] for values in losses.values())


@pytest.mark.thorough
def test_untrained_teacher_is_refused(student, tmp_path, few_tasks):
    settings = loop.Settings(tmp_path, steps=2, link_minutes=10.0, largest=64)
    with pytest.raises(ValueError, match="expected a trained editor, got one whose output is the same everywhere"):
        train_link.train_link(student, build.kontext(0), probes_of(student), settings, loop.Log(tmp_path / "log.json"))


@pytest.mark.thorough
@pytest.mark.parametrize("follow", [False, True])
def test_small_images_come_first_unless_following(student, teacher, tmp_path, monkeypatch, follow):
    shares = []

    def learn(pipe, more, settings, log, *_):
        clock = loop.Clock(1.0)
        monkeypatch.setattr(train_editor, "mixture", lambda progress: shares.append(progress) or {64: 1.0})
        next(train_editor.batches(pipe, settings, clock, 0))

    monkeypatch.setattr(train_link, "learn", learn)
    monkeypatch.setitem(train_editor.BATCHES, (64, 64), 1)
    settings = loop.Settings(out=tmp_path, model="qwen", start=tmp_path, like=tmp_path, follow=follow)
    train_link.train_link(student, teacher, None, settings, loop.Log(tmp_path / "log.json"))
    assert (shares[0] >= 0.5) is follow

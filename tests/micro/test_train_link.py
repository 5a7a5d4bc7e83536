"""Words are brought into inherited blocks without touching what the blocks know of pictures."""

import copy

import pytest
import torch

from specedit.micro import build, build_qwen, inherit, scenes, train_link, training
from specedit.micro.train_editor import encode


@pytest.fixture(scope="module")
def teacher():
    pipe = build.kontext(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as initialised, its blocks are the identity
        for module in pipe.transformer.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                module.weight.copy_(0.05 * torch.randn(module.weight.shape, generator=generator))
        # Words that differ are to be heard.
        pipe.transformer.context_embedder.weight.mul_(3.0)
    return pipe


@pytest.fixture
def student(teacher):
    pipe = build_qwen.qwen(0)
    inherit.inherit(pipe, teacher)
    return pipe


def test_only_the_first_blocks_run_inside_and_all_again_outside(student):
    model = student.transformer
    blocks, seen = model.transformer_blocks, []
    hooks = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(blocks)]
    batch = encode(student, [scenes.describe(s) for s in training.seeds(0, 2)], (64, 64), "cpu")
    family = train_link.of(student)
    call = (batch.target, batch.source, batch.grid, torch.tensor([0.9, 0.5]))
    with torch.no_grad():
        features = family.text(student, batch.prompts, batch.seen, "cpu")
        whole = family.velocity(student, *call, features)
        with train_link.only_first(model) as states:
            family.velocity(student, *call, features)
        again = family.velocity(student, *call, features)
    assert seen == [*range(6), 0, 1, *range(6)]
    assert torch.equal(whole, again) and model.transformer_blocks is blocks
    assert len(states) == 1 and states[0].shape == (2, 32, 256)  # target and reference
    with pytest.raises(RuntimeError), train_link.only_first(model):
        raise RuntimeError
    assert model.transformer_blocks is blocks and len(blocks[1]._forward_hooks) == 1
    for hook in hooks:
        hook.remove()


def test_who_says_what_the_teacher_says_has_no_distance(student, teacher):
    batch = encode(student, [scenes.describe(s) for s in training.seeds(0, 6)], (64, 64), "cpu")
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(torch.stack(train_link.link_loss(student, teacher, batch, "cpu")))
    assert torch.equal(*losses) and bool((losses[0] > 0).all())

    class Echo:  # a student that is the teacher
        transformer, scheduler = teacher.transformer, student.scheduler

    pooled = None

    def text(pipe, prompts, seen, device):
        nonlocal pooled
        embeds, each = train_link.family_kontext.text(teacher, prompts, None, device)
        pooled = each.mean(0, keepdim=True).expand(len(prompts), -1)
        return embeds

    def velocity(pipe, x, source, grid, sigma, embeds, at):
        guidance = torch.full_like(sigma, inherit.GUIDANCE)
        return train_link.family_kontext.velocity_at(teacher, x, source, grid, sigma, (embeds, pooled), guidance, at)

    family = type("family", (), {"text": staticmethod(text), "velocity": staticmethod(velocity)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_link, "of", lambda pipe: family)
        distance, unit = train_link.link_loss(Echo, teacher, batch, "cpu")
        assert distance == 0 and unit > 0
        distance, unit = train_link.link_loss(Echo, teacher, batch.part(torch.tensor([1, 6, 7])), "cpu")
        assert distance == 0 and unit > 0


def test_only_the_side_of_the_words_learns(student, teacher, tmp_path):
    before = {
        name: copy.deepcopy(getattr(student, name).state_dict()) for name in ("transformer", "text_encoder", "vae")
    }
    known = copy.deepcopy(teacher.transformer.state_dict())
    settings = training.Settings(tmp_path, steps=2, link_minutes=10.0, largest=64)
    train_link.train_link(student, teacher, settings, training.Log(tmp_path / "log.json"))
    changed = {
        f"{part}.{name}" for part, old in before.items() for name, value in getattr(student, part).state_dict().items()
        if not torch.equal(value, old[name])
    }  # fmt: skip
    ours = [name for name in changed if name.startswith("transformer.")]
    assert "transformer.txt_in.weight" in ours and "transformer.transformer_blocks.0.attn.add_v_proj.weight" in ours
    words = ("txt_", "add_", "norm_added")
    assert all(any(word in name for word in words) for name in ours)
    assert not any(f"transformer_blocks.{i}." in name for name in ours for i in range(2, 6))
    assert any(name.startswith("text_encoder.") for name in changed) and not any(n.startswith("vae.") for n in changed)
    assert all(torch.equal(value, known[name]) for name, value in teacher.transformer.state_dict().items())
    assert not any(p.requires_grad for p in student.transformer.parameters())


def test_it_is_learned(student, teacher):
    batch = encode(student, [scenes.describe(s) for s in training.seeds(0, 8)], (64, 64), "cpu")
    for module in (modules := train_link.words_side(student)):
        module.requires_grad_(True)
    optimizer = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, _ = train_link.link_loss(student, teacher, batch, "cpu")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_an_editor_that_hears_nothing_is_no_teacher(student, tmp_path):
    settings = training.Settings(tmp_path, steps=2, link_minutes=10.0, largest=64)
    with pytest.raises(ValueError, match="expected a trained editor, got one that does the same whatever the prompt"):
        train_link.train_link(student, build.kontext(0), settings, training.Log(tmp_path / "log.json"))

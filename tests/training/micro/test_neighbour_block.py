"""T5 knows the order of words: two heads attend to neighbours, a block learns them, logits grow slowly."""

import pytest
import torch

from specedit.micro.kontext import TEXT_TOKENS
from training.micro import build, loop, neighbour_block, train

PROMPTS = ["make the background red and blue stripes", "make the background blue and red stripes"]
RED = 3, 5  # which word "red" is in each


def words(pipe):
    padded = dict(padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    return pipe.tokenizer_2(PROMPTS, **padded).input_ids


@torch.no_grad()
def states(pipe):
    return pipe.text_encoder_2(words(pipe))[0]


@pytest.fixture
def shallow(monkeypatch):
    """An editor without T5's neighbour block, its attention collapsed as by training."""
    with monkeypatch.context() as patched:
        patched.setattr(build, "T5_LAYERS", 2)
        patched.setattr(build, "attend_to_neighbours", lambda encoder: None)
        pipe = build.kontext()
    with torch.no_grad():
        for block in pipe.text_encoder_2.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(1e4)
    return pipe


def test_two_heads_attend_to_the_next_and_the_previous_token():
    pipe = build.kontext()
    encoder = pipe.text_encoder_2
    encoder.set_attn_implementation("eager")
    with torch.no_grad():
        last = encoder(words(pipe), output_attentions=True).attentions[-1]
    for head, distance in ((0, 1), (1, -1)):
        assert float(last[:, head].diagonal(distance, 1, 2).min()) > 0.98
    assert float(last[:, 2:].max()) < 0.9  # the others do not


def test_t5_without_neighbour_block_ignores_order(shallow):
    assert neighbour_block.lacks_neighbour_block(shallow) and not neighbour_block.lacks_neighbour_block(build.kontext())
    before = states(shallow)
    assert torch.allclose(before[0, RED[0]], before[1, RED[1]], atol=1e-4)
    old = {name: value.clone() for name, value in shallow.text_encoder_2.state_dict().items()}
    block = neighbour_block.add_neighbour_block(shallow)
    assert not neighbour_block.lacks_neighbour_block(shallow) and block is shallow.text_encoder_2.encoder.block[-1]
    assert len(shallow.text_encoder_2.encoder.block) == shallow.text_encoder_2.config.num_layers == build.T5_LAYERS
    moved = (states(shallow) - before).square().mean() / before.var()
    assert float(moved) < 1e-3
    changed = {n for n, v in shallow.text_encoder_2.state_dict().items() if n in old and not torch.equal(v, old[n])}
    assert changed == {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}


@pytest.mark.thorough
def test_neighbour_block_learns_the_order(shallow, at_full_rate, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOGGED", 18)
    monkeypatch.setattr(neighbour_block, "BATCH", 12)
    before = states(shallow)
    log = loop.Log(tmp_path / "log.json")
    torch.manual_seed(0)
    settings = loop.Settings(tmp_path, text_minutes=10.0, steps=36)
    neighbour_block.train_neighbour_block(shallow, settings, log)
    first, second = log.rows
    assert first["part"] == "neighbour_block" and second["neighbours"] < 0.5 * first["neighbours"]
    after = states(shallow)
    moved = (after - before).square().mean() / before.var()
    assert float(moved) < 0.3  # still what the transformer was trained on
    apart = (after[0, RED[0]] - after[1, RED[1]]).norm() / after[0, RED[0]].norm()
    assert float(apart) > 0.1
    assert not any(p.requires_grad for p in shallow.text_encoder_2.parameters())


def test_neighbour_ids_are_the_next_and_the_previous():
    got = neighbour_block.neighbour_ids(torch.tensor([[5, 6, 7]]))
    assert got.tolist() == [[[6, 7], [7, 5], [5, 6]]]


def test_t5_queries_and_keys_learn_slowly():
    encoder = build.kontext().text_encoder_2.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optims = loop.optimizers([encoder], 1e-3)
    loss = sum(p.sum() for p in encoder.parameters())
    loop.descend(loss, list(encoder.parameters()), optims, 1e-3)
    steps = {name: float((p - before[name]).abs().max()) for name, p in encoder.named_parameters()}
    slow = {name for name in steps if ".q." in name or ".k." in name}
    assert len(slow) == 2 * build.T5_LAYERS
    for name, step in steps.items():
        assert step == pytest.approx(1e-4 if name in slow else 1e-3, rel=0.01), name


@pytest.mark.thorough
def test_training_adds_a_missing_neighbour_block(few_tasks, shallow, tmp_path):
    build.save(shallow, tmp_path / "old")
    settings = dict(
        out=tmp_path / "run", start=tmp_path / "old", steps=1, largest=64, probe_minutes=0.0, save_minutes=0.0
    )
    pipe = train.train(loop.Settings(**settings, minutes=5.0))
    assert not neighbour_block.lacks_neighbour_block(pipe)
    again = train.train(loop.Settings(**settings, minutes=0.001))  # resumed, and past its time
    for name, value in pipe.text_encoder_2.state_dict().items():
        assert torch.allclose(value, again.text_encoder_2.state_dict()[name], atol=1e-2), name
    more = dict(out=tmp_path / "more", start=tmp_path / "run" / "editor", minutes=0.0)
    third = train.train(loop.Settings(**settings | more))
    assert third.text_encoder_2.config.num_layers == build.T5_LAYERS

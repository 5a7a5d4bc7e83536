"""The landmarks: every prompt ends with them, and the first block's image tokens can read their position from them."""

import math
from functools import partial

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from specedit.micro import kontext
from specedit.micro.kontext import TEXT_TOKENS
from training.micro import build, family_kontext, landmarks, loop, train

PROMPTS = ["make it grey", "add a small yellow hexagon at the bottom right of the picture", ""]


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.thorough), 30], ids=["fresh", "trained"])
def placed(request):
    pipe = build.kontext()
    with torch.no_grad():  # the blocks of a trained encoder add more to the embeddings than fresh ones do
        for block in pipe.text_encoder_2.encoder.block:
            block.layer[0].SelfAttention.o.weight.mul_(request.param)
            block.layer[-1].DenseReluDense.wo.weight.mul_(request.param)
    landmarks.add_landmarks(pipe)
    return pipe


@pytest.mark.thorough
def test_every_prompt_ends_with_landmarks_even_if_truncated(placed, tmp_path):
    build.save(placed, tmp_path)
    placed.to(dtype=torch.float32)
    again = kontext.read(tmp_path, torch_dtype=torch.float32)
    for pipe in (placed, again):
        tokenizer = pipe.tokenizer_2
        wanted = [tokenizer.eos_token, *landmarks.NAMES]
        for prompt in (*PROMPTS, "yellow " * 100):
            ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=TEXT_TOKENS).input_ids
            names = [n for n in tokenizer.convert_ids_to_tokens(ids) if n != tokenizer.pad_token]
            assert names[-len(wanted) :] == wanted and names.count(landmarks.NAMES[0]) == 1
        assert pipe.text_encoder_2.config.vocab_size == len(tokenizer)
        assert pipe.text_encoder_2.get_input_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.thorough
def test_adding_landmarks_twice_changes_nothing(placed):
    before = {name: value.clone() for name, value in placed.transformer.state_dict().items()}
    words = len(placed.tokenizer_2)
    landmarks.add_landmarks(placed)
    assert len(placed.tokenizer_2) == words
    assert all(torch.equal(value, before[name]) for name, value in placed.transformer.state_dict().items())


def weights(pipe, grid):
    """Attention of image to text tokens in the landmark heads, (B, heads, N, text), and the text's ids."""
    attn = pipe.transformer.transformer_blocks[0].attn
    seen = {}

    def see(module, name):
        return module.register_forward_hook(lambda _m, _inputs, output: seen.__setitem__(name, output))

    hooks = [see(attn.to_q, "q"), see(attn.to_k, "k"), see(attn.add_k_proj, "text")]
    n = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    x, source = torch.randn(2, len(PROMPTS), n, 64, generator=generator)
    with torch.no_grad():
        features = family_kontext.text(pipe, PROMPTS, None, "cpu")
        family_kontext.velocity(pipe, x, source, grid, torch.tensor([0.1, 0.5, 1.0]), features, generator=generator)
        q, k, text = (t.unflatten(-1, (4, 64)) for t in (seen["q"], seen["k"], seen["text"]))
        q, k, text = attn.norm_q(q), attn.norm_k(k), attn.norm_added_k(text)
        places = torch.cat([family_kontext.ids(grid, image, "cpu") for image in (0, 1)])
        turn = partial(apply_rotary_emb, freqs_cis=pipe.transformer.pos_embed(places), sequence_dim=1)
        logits = torch.einsum("bnhd,bmhd->bhnm", turn(q), torch.cat([text, turn(k)], 1)) / 8
    for hook in hooks:
        hook.remove()
    heads = [head for head, _ in landmarks.LANDMARK_HEADS]
    ids = pipe.tokenizer_2(PROMPTS, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    return logits.softmax(-1)[:, heads, :n, :TEXT_TOKENS], ids


@pytest.mark.thorough
def test_attention_to_landmarks_follows_the_formula(placed):
    grid = (6, 10)
    given, ids = weights(placed, grid)
    first = placed.tokenizer_2.convert_tokens_to_ids(landmarks.NAMES[0])
    at = torch.stack([(row == first).nonzero().flatten()[0] + torch.arange(landmarks.LANDMARKS) for row in ids])
    given = given.gather(-1, at[:, None, None].expand(*given.shape[:3], -1))  # (B, looks, N, LANDMARKS)
    assert given.sum(-1).min() > 0.9  # nearly all of the attention
    places = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"), -1).flatten(0, 1)
    phases = 2 * math.pi * torch.arange(landmarks.PHASES) / landmarks.PHASES
    for look, (_, pair) in enumerate(landmarks.LANDMARK_HEADS):
        for axis in (0, 1):
            part = given[:, look, :, axis * landmarks.PHASES : (axis + 1) * landmarks.PHASES]
            turned = 10000 ** (-2 * pair / 28) * places[:, axis, None] - phases
            # q: still and two turning channels; k: still and one turning pair; both of length sqrt(64).
            expected = (8 / math.sqrt(6) * turned.cos()).softmax(-1)
            got = part / part.sum(-1, keepdim=True)
            assert (got - expected).abs().mean() < 0.05 and expected.max() > 0.5


def test_position_is_linearly_readable_from_the_attention(placed):
    grid = (6, 10)
    given, _ = weights(placed, grid)
    known = given.permute(0, 2, 1, 3).flatten(2)  # (B, N, looks * text)
    known = torch.cat([known, torch.ones(*known.shape[:2], 1)], -1)
    places = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"), -1).flatten(0, 1).float()
    solved = torch.linalg.lstsq(known[0], places, driver="gelsd").solution
    assert (known[0] @ solved - places).abs().max() < 0.1


@pytest.mark.thorough
def test_other_heads_are_unchanged():
    pipe = build.kontext()
    old = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    landmarks.add_landmarks(pipe)
    touched = torch.zeros(256, dtype=torch.bool)
    for head, _ in landmarks.LANDMARK_HEADS:
        touched[head * 64 : (head + 1) * 64] = True
    changed = {name for name, value in pipe.transformer.state_dict().items() if not torch.equal(value, old[name])}
    assert changed and all(name.startswith("transformer_blocks.0.attn.") for name in changed)
    attn = pipe.transformer.transformer_blocks[0].attn
    for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"):
        assert torch.equal(
            getattr(attn, name).weight[~touched], old[f"transformer_blocks.0.attn.{name}.weight"][~touched]
        )
    for name in ("to_out.0", "to_add_out"):
        new, before = attn.get_submodule(name).weight, old[f"transformer_blocks.0.attn.{name}.weight"]
        assert torch.equal(new[:, ~touched], before[:, ~touched])
    assert not attn.to_add_out.weight[:, touched].any()  # text tokens do not read them


@pytest.mark.thorough
@pytest.mark.parametrize("start", [False, True])
def test_training_adds_landmarks(start, tmp_path, few_tasks, monkeypatch):
    known = []
    for part in ("vae", "text", "probes", "editor"):
        monkeypatch.setattr(
            train,
            f"train_{part}",
            lambda pipe, *_, part=part: known.append((part, landmarks.NAMES[0] in pipe.tokenizer_2.get_vocab())),
        )
    begin = tmp_path / "start" if start else None
    if start:  # from an editor that has none
        build.save(build.kontext(), begin)
    train.train(loop.Settings(tmp_path, start=begin))
    assert dict(known)["probes"] and dict(known)["editor"]
    assert start or not dict(known)["text"]  # fitted to the trained text encoder
    (tmp_path / "editor.pt").touch()
    known.clear()
    train.train(loop.Settings(tmp_path, start=begin))
    assert dict(known)["editor"]  # a resumed run has them too

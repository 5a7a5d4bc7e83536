"""A Qwen editor's template tokens act as the Kontext editor's landmarks, and its text attends as that one's."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from specedit.micro import kontext, qwen, scenes
from specedit.micro.kontext import TEXT_TOKENS
from specedit.micro.loading import WEIGHTS
from training.micro import build_qwen, family_kontext, family_qwen, inherit, inherit_places, landmarks
from training.micro.landmarks import LANDMARKS

PROMPTS = ["make it grey", "add a small yellow hexagon at the bottom right of the picture", " "]
HEADS = [head for head, _ in landmarks.LANDMARK_HEADS]


@pytest.mark.thorough
def test_every_prompt_begins_with_the_same_tokens(tmp_path):
    pipe = build_qwen.qwen()
    with torch.no_grad():
        before, _ = family_qwen.text(pipe, PROMPTS, None, "cpu")
    for _ in range(2):  # once is enough
        inherit_places.prepend_tokens(pipe)
    build_qwen.save(pipe, tmp_path)
    again = qwen.read(tmp_path, torch_dtype=torch.float32)
    picture = scenes.sample(3, 64).source
    for one in (pipe, again):
        assert len(one.tokenizer("").input_ids) == len(one.processor.tokenizer("").input_ids) == LANDMARKS
        with torch.no_grad():
            embeds, _ = family_qwen.text(one, PROMPTS, None, "cpu")
            seen, mask = one.encode_prompt(prompt=PROMPTS[1], image=[picture])
        assert embeds.shape[1] == before.shape[1] + LANDMARKS
        for states in (embeds, seen):
            assert torch.allclose(states[:, :LANDMARKS], embeds[:1, :LANDMARKS], atol=1e-5)
        assert not torch.allclose(embeds[0, LANDMARKS:], embeds[1, LANDMARKS:], atol=1e-2)
        assert torch.cdist(embeds[0, :LANDMARKS], embeds[0, :LANDMARKS]).add(torch.eye(LANDMARKS)).min() > 0.1


@pytest.mark.parametrize("side", [8, 5])
def test_rotated_text_keys_act_as_keys_at_the_origin(side):
    axes, tokens = [8, 28, 28], 7
    query, key = torch.randn(2 * side**2, 64), torch.randn(tokens, 64)
    places = torch.cat([family_kontext.ids((side, side), image, "cpu") for image in (0, 1)])
    cos, sin = FluxPosEmbed(10000, axes)(places)

    def complexes(vectors):
        return torch.view_as_complex(vectors.reshape(len(vectors), -1, 2))

    expected = (complexes(query) * torch.complex(cos[:, ::2].float(), sin[:, ::2].float())).conj() @ complexes(key).T
    rotary = build_qwen.transformer().pos_embed
    picture, text = rotary([[(1, side, side)] * 2], device=torch.device("cpu"), max_txt_seq_len=tokens)
    angles = inherit_places.inverse_angles(tokens, side, axes, 10000)
    turned = inherit_places.rotate(key[None, :, None], angles)[0, :, 0]
    got = (complexes(query) * picture).conj() @ (complexes(turned) * text).T
    assert torch.allclose(got.real, expected.real, atol=1e-4)
    plain = (complexes(query) * picture).conj() @ (complexes(key) * text).T
    assert not torch.allclose(plain.real, expected.real, atol=1.0)


@torch.no_grad()
def given(pipe, run, tokens):
    """What picture tokens give the text's tokens in the looking heads of the first block: (B, looks, N, tokens)."""
    attn, seen = pipe.transformer.transformer_blocks[0].attn, {}
    names = {"to_q": attn.to_q, "to_k": attn.to_k, "add_k_proj": attn.add_k_proj}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, out))
        for name, module in names.items()
    ]
    picture, text = run()
    for hook in hooks:
        hook.remove()

    def turn(name, norm, angles):
        pairs = torch.view_as_complex(norm(seen[name].unflatten(-1, (4, 64))).unflatten(-1, (-1, 2)).contiguous())
        return pairs * angles[:, None]

    # Text first.
    keys = torch.cat([turn("add_k_proj", attn.norm_added_k, text), turn("to_k", attn.norm_k, picture)], 1)
    logits = torch.einsum("bnhd,bmhd->bhnm", turn("to_q", attn.norm_q, picture).conj(), keys).real / 8
    n = len(picture) // 2
    return logits.softmax(-1)[:, HEADS, :n, tokens]


@pytest.mark.thorough
@pytest.mark.parametrize("seed, bound", [(0, 0.5), (1, 0.35)])
def test_attention_to_template_tokens_is_that_to_landmarks(monkeypatch, seed, bound):
    """With the packaged editors, at the size that is fitted for; smaller here, to be quick. The packaged Qwen editor
    has taken over already, so its words come to the blocks as an editor's that has not: by a projection that knows of
    no landmarks."""
    for name, value in (("SIDE", 128), ("SAMPLES", 64), ("WITH_IMAGE", 4), ("IMAGE_TOKENS", 64)):
        monkeypatch.setattr(inherit_places, name, value)
    teacher = kontext.read(WEIGHTS / "kontext", torch_dtype=torch.float32)
    pipe = qwen.read(WEIGHTS / "qwen", torch_dtype=torch.float32)
    pipe.transformer.txt_in = build_qwen.qwen(seed).transformer.txt_in
    inherit.inherit_transformer(pipe, teacher)
    grid, sigma = (8, 8), torch.tensor([0.9, 0.4])
    torch.manual_seed(0)
    x, source = torch.randn(2, 2, 64, 64)
    words = family_kontext.text(teacher, PROMPTS[:2], None, "cpu")
    first = teacher.tokenizer_2.convert_tokens_to_ids(landmarks.NAMES[0])
    ids = teacher.tokenizer_2(PROMPTS[:2], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    at = [(row == first).nonzero().item() for row in ids]

    def kontext_angles():
        guidance = torch.full_like(sigma, inherit.GUIDANCE)
        family_kontext.velocity_at(teacher, x, source, grid, sigma, words, guidance)
        places = torch.cat([family_kontext.ids(grid, image, "cpu") for image in (0, 1)])
        cos, sin = teacher.transformer.pos_embed(torch.cat([torch.zeros(TEXT_TOKENS, 3), places]))
        angles = torch.complex(cos[:, ::2].float(), sin[:, ::2].float())
        return angles[TEXT_TOKENS:], angles[:TEXT_TOKENS]

    def qwen_angles():
        features = family_qwen.text(pipe, PROMPTS[:2], None, "cpu")
        family_qwen.velocity(pipe, x, source, grid, sigma, features)
        return pipe.transformer.pos_embed(
            [[(1, *grid)] * 2], device=torch.device("cpu"), max_txt_seq_len=features[0].shape[1]
        )

    whole = given(teacher, kontext_angles, slice(None))
    expected = torch.stack([whole[i, ..., k : k + LANDMARKS] for i, k in enumerate(at)])
    assert expected.sum(-1).mean() > 0.5  # most of these heads' attention
    before = given(pipe, qwen_angles, slice(LANDMARKS))
    inherit_places.inherit_landmarks(pipe, teacher)
    after = given(pipe, qwen_angles, slice(LANDMARKS))

    def share(parts):  # of what is given to landmarks at all
        return parts / parts.sum(-1, keepdim=True)

    distances = [float((share(got) - share(expected)).abs().sum(-1).mean()) for got in (before, after)]
    assert distances[1] < bound * distances[0]
    assert after.sum(-1).mean() > 0.5

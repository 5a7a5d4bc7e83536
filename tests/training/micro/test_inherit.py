"""Inherited blocks compute what they did in the Kontext editor."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from specedit.micro import kontext, qwen
from specedit.micro.loading import WEIGHTS
from training.micro import build, build_qwen, inherit, landmarks, loop, train, train_vae
from training.micro.family_kontext import velocity_at
from training.micro.family_qwen import latents
from training.micro.family_qwen import velocity as qwen_velocity

WIDTH, HEADS, WORDS, PICTURE = 128, 2, 3, 6


def randomly(module, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture
def states():
    """Text and picture tokens, time embedding, and one rotary table as each of the two takes it."""
    generator = torch.Generator().manual_seed(1)
    words, picture = (torch.randn(2, n, WIDTH, generator=generator) for n in (WORDS, PICTURE))
    time = torch.randn(2, WIDTH, generator=generator)
    cos, sin = FluxPosEmbed(10000, [8, 28, 28])(torch.randint(0, 5, (WORDS + PICTURE, 3), generator=generator).float())
    angles = torch.complex(cos[:, ::2].float(), sin[:, ::2].float())
    return words, picture, time, (cos, sin), (angles[WORDS:], angles[:WORDS])


def both(block, theirs, states):
    words, picture, time, flux_rotary, rotary = states
    with torch.no_grad():
        expected = theirs(picture, words, time, flux_rotary)
        got = block(picture, words, None, time, rotary)
    return got, expected


def test_double_stream_block(states):
    double = randomly(FluxTransformerBlock(WIDTH, HEADS, 64))
    block = QwenImageTransformerBlock(WIDTH, HEADS, 64).eval()
    inherit.from_double(block, double)
    for got, expected in zip(*both(block, double, states), strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4) and expected.std() > 0.5


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_either_half_of_a_single_stream_block(states, part):
    """Side by side and one after the other are the same where one of the two does nothing."""
    single = randomly(FluxSingleTransformerBlock(WIDTH, HEADS, 64))
    with torch.no_grad():
        if part == "attention":
            single.proj_out.weight[:, WIDTH:] = 0
        else:
            single.proj_out.weight[:, :WIDTH] = 0
            single.proj_out.bias.zero_()
    block = QwenImageTransformerBlock(WIDTH, HEADS, 64).eval()
    inherit.from_single(block, single)
    for got, expected, before in zip(*both(block, single, states), states[:2], strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert (expected - before).std() > 0.1


def test_whole_transformer_without_text():
    """Their places differ between the two models, so no token listens to them; single-stream blocks are switched off,
    since theirs are the picture's own weights."""
    shared = dict(attention_head_dim=64, num_attention_heads=HEADS, joint_attention_dim=32, axes_dims_rope=(8, 28, 28))
    source = randomly(
        FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=2, pooled_projection_dim=16, guidance_embeds=True, **shared
        )
    )
    with torch.no_grad():
        for name in ("add_k_proj", "add_v_proj"):  # no logit, no value
            getattr(source.transformer_blocks[0].attn, name).weight.zero_()
            getattr(source.transformer_blocks[0].attn, name).bias.zero_()
        for single in source.single_transformer_blocks:
            single.norm.linear.weight[2 * WIDTH :] = single.norm.linear.bias[2 * WIDTH :, None] = 0
    target = QwenImageTransformer2DModel(patch_size=2, in_channels=64, out_channels=16, num_layers=2, **shared).eval()
    pooled = torch.randn(1, 16)
    inherit.copy_transformer(target, source, pooled)
    x, reference = torch.randn(2, 1, 12, 64)
    words, sigma = torch.randn(1, WORDS, 32), torch.tensor([0.6])
    flux, other = (type("pipe", (), {"transformer": model}) for model in (source, target))
    with torch.no_grad():
        expected = velocity_at(flux, x, reference, (3, 4), sigma, (words, pooled), torch.tensor([inherit.GUIDANCE]))
        mask = torch.ones(1, WORDS, dtype=torch.bool)
        got = qwen_velocity(other, x, reference, (3, 4), sigma, (words, mask))
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3) and expected.std() > 0.1


@pytest.mark.thorough
def test_other_sizes_are_refused():
    source = build.transformer()
    for config, message in (
        (dict(num_attention_heads=3), "width: expected 256, as the editor to inherit from has, got 192"),
        (dict(num_attention_heads=8, attention_head_dim=32, axes_dims_rope=(8, 12, 12)), "heads: expected 4, .* got 8"),
        (dict(num_layers=5), "blocks: expected 6, .* got 5"),
    ):
        target = QwenImageTransformer2DModel.from_config({**build_qwen.transformer().config, **config})
        before = target.img_in.weight.clone()
        with pytest.raises(ValueError, match=message):
            inherit.copy_transformer(target, source, torch.zeros(1, 128))
        assert torch.equal(target.img_in.weight, before)


@pytest.mark.thorough
def test_autoencoder_is_distilled():
    torch.manual_seed(0)
    vae, other = build.autoencoder(), build.autoencoder()
    images = train_vae.vae_images(0, 2, 32, "cpu")
    losses = [
        train_vae.vae_loss(vae, images, torch.Generator().manual_seed(0), teacher=teacher)[0] for teacher in (None, vae)
    ]
    assert torch.equal(*losses)
    with torch.no_grad():
        other.encoder.conv_out.bias[:16] += 1

    @torch.no_grad()
    def distance():
        means = [one.encode(images).latent_dist.mean for one in (vae, other)]
        return float((means[0] - means[1]).square().mean())

    before, optimizer = distance(), torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        train_vae.vae_loss(vae, images, teacher=other)[0].backward()
        optimizer.step()
    assert distance() < 0.98 * before and all(p.grad is None for p in other.parameters())


@pytest.mark.thorough
def test_training_inherits_and_refuses_what_does_not_fit(tmp_path, few_tasks):
    teacher = build.kontext(1)
    with torch.no_grad():
        teacher.transformer.proj_out.weight.normal_()
    landmarks.add_landmarks(teacher)
    teacher.vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    build.save(teacher, tmp_path / "kontext")
    # Autoencoder and link alone: what follows is the same without an editor to inherit from.
    few = dict(vae_minutes=10.0, text_minutes=0.0, minutes=0.0, largest=64, steps=1, like=tmp_path / "kontext")
    pipe = train.train(loop.Settings(tmp_path / "qwen", model="qwen", **few))
    ours, theirs = pipe.transformer, teacher.transformer
    close = dict(atol=2e-2)  # one step of training and half precision on disk
    assert torch.allclose(
        ours.transformer_blocks[1].attn.to_k.weight, theirs.transformer_blocks[1].attn.to_k.weight, **close
    )
    assert torch.allclose(
        ours.transformer_blocks[3].attn.to_q.weight, theirs.single_transformer_blocks[2].attn.to_q.weight, **close
    )
    assert torch.allclose(ours.proj_out.weight, theirs.proj_out.weight, **close)
    assert pipe.vae.config.latents_mean == [0.25] * 16 and pipe.vae.config.latents_std == [0.5] * 16
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(picture[:, :, None]).latent_dist.mean[:, :, 0]
    assert torch.allclose(latents(pipe.vae, picture), (mean - 0.25) * 2, atol=1e-4)
    with pytest.raises(ValueError, match="--like: expected --model qwen, got kontext"):
        train.train(loop.Settings(tmp_path / "new", model="kontext", **few))
    assert inherit.latent_distance(pipe, teacher) > inherit.SAME_LATENTS  # one step is not enough to learn its latents
    with pytest.raises(ValueError, match=r"--start: expected an editor with the latents of --like, .* by \d"):
        train.train(loop.Settings(tmp_path / "new", model="qwen", start=tmp_path / "qwen" / "editor", **few))
    with pytest.raises(ValueError, match=r"--like: expected a FluxKontextPipeline in .*, got a Qwen"):
        train.train(loop.Settings(tmp_path / "new", model="qwen", **few | {"like": tmp_path / "qwen" / "editor"}))
    build.save(build.kontext(1), tmp_path / "bare")
    with pytest.raises(ValueError, match=r"--like: expected an editor with landmarks, got .*bare"):
        train.train(loop.Settings(tmp_path / "new", model="qwen", **few | {"like": tmp_path / "bare"}))


@pytest.mark.thorough
def test_trained_editor_inherits_the_transformer_only(tmp_path, monkeypatch):
    """The packaged editors have the same latents; autoencoder and words stay, and are joined to the new blocks."""
    done = []
    for part in ("vae", "text", "link", "probes", "editor"):
        monkeypatch.setattr(train, f"train_{part}", lambda *_, part=part: done.append(part))
    monkeypatch.setattr(train, "inherit_landmarks", lambda *_: done.append("landmarks"))
    start, like = WEIGHTS / "qwen", WEIGHTS / "kontext"
    got = train.train(loop.Settings(tmp_path, model="qwen", start=start, like=like))
    assert done == ["landmarks", "link", "probes", "editor"]
    assert len(got.tokenizer("").input_ids) == landmarks.LANDMARKS
    old = qwen.read(start, torch_dtype=torch.float32)
    teacher = kontext.read(like, torch_dtype=torch.float32)
    assert 0 < inherit.latent_distance(got, teacher) < inherit.SAME_LATENTS
    for name in ("vae", "text_encoder"):
        kept = getattr(old, name).state_dict()
        assert all(torch.equal(kept[key], value) for key, value in getattr(got, name).state_dict().items())
    ours, before, theirs = got.transformer, old.transformer, teacher.transformer
    assert torch.equal(ours.txt_in.weight, before.txt_in.weight)
    block, double = ours.transformer_blocks[0], theirs.transformer_blocks[0]
    assert torch.equal(block.attn.to_q.weight, double.attn.to_q.weight)
    assert not torch.equal(block.attn.to_q.weight, before.transformer_blocks[0].attn.to_q.weight)
    fresh = build_qwen.qwen(0)
    inherit.inherit_transformer(fresh, teacher)  # an embedding of time that has learned is replaced, not added to
    bias = "time_text_embed.timestep_embedder.linear_2.bias"
    assert torch.equal(ours.state_dict()[bias], fresh.transformer.state_dict()[bias])


@pytest.mark.thorough
def test_follow_keeps_the_transformer(tmp_path, monkeypatch):
    done = []
    for part in ("link", "probes", "editor"):
        monkeypatch.setattr(train, f"train_{part}", lambda *_, part=part: done.append(part))
    start, like = WEIGHTS / "qwen", WEIGHTS / "kontext"
    settings = loop.Settings(tmp_path, model="qwen", start=start, like=like, follow=True, minutes=0)
    got = train.train(settings)
    assert done == ["link"]
    kept = qwen.read(start, torch_dtype=torch.float32).transformer.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in got.transformer.state_dict().items())
    for missing in ("start", "like"):
        parts = {"start": start, "like": like, missing: None}
        with pytest.raises(ValueError, match=r"--follow: expected --start, .* and --like"):
            train.train(loop.Settings(tmp_path, model="qwen", follow=True, **parts))

"""The trainer computes what the Qwen pipeline computes."""

import pytest
import torch

from specedit import micro
from specedit.cost.flops import transformer_flops
from specedit.micro import scenes
from specedit.micro.evaluation import stock_flops
from training.micro import family_qwen, loop
from training.micro.family_qwen import FlatAutoencoder
from training.micro.train_editor import drop_prompts, encode, pack


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def livelier(small_qwen):
    """Its autoencoder with every weight at work, but for the frames before the first."""
    torch.manual_seed(0)
    for module in small_qwen.vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.reset_parameters()
    return small_qwen


def test_flat_autoencoder_matches_the_real_one(livelier):
    vae, images = livelier.vae, scenes.draw([scenes.describe(1)], 64, 96)[0] * 2 - 1
    flat = FlatAutoencoder(vae)
    with torch.no_grad():
        real = vae.encode(images[:, :, None]).latent_dist
        ours = flat.encode(images).latent_dist
        close(ours.mean, real.mean[:, :, 0])
        close(ours.std, real.std[:, :, 0])
        decoded = flat.decode(ours.mean).sample
        close(decoded.clamp(-1, 1), vae.decode(real.mean).sample[:, :, 0])
    assert decoded.shape == images.shape
    assert not any("forward" in vars(module) for module in vae.modules())  # nothing stays behind


def test_vae_is_restored_after_an_error(small_qwen):
    with pytest.raises(RuntimeError):
        FlatAutoencoder(small_qwen.vae).encode(torch.zeros(1, 5, 16, 16))
    assert not any("forward" in vars(module) for module in small_qwen.vae.modules())


def test_latents_and_statistics_match_the_pipeline(livelier):
    images = scenes.draw([scenes.describe(s) for s in range(4)], 64, 64)[0] * 2 - 1
    with torch.no_grad():
        raw = FlatAutoencoder(livelier.vae).encode(images).latent_dist.mean
        family_qwen.set_statistics(livelier.vae, raw)
        latents = family_qwen.latents(livelier.vae, images)
        own = livelier._encode_vae_image(images[:, :, None], torch.Generator())[:, :, 0]
    close(latents, own)
    assert len(livelier.vae.config.latents_mean) == len(livelier.vae.config.latents_std) == 16
    close(latents.mean((0, 2, 3)), torch.zeros(16), 5e-3)
    close(latents.transpose(0, 1).flatten(1).std(1), torch.ones(16), 5e-3)


@pytest.mark.parametrize("prompts", [["remove the red star"], ["make it greyscale", "turn the ring into a cross"]])
def test_text_matches_encode_prompt(small_qwen, prompts):
    pictures = [scenes.sample(seed, 64).source for seed in range(len(prompts))]
    embeds, mask = small_qwen.encode_prompt(prompts, image=pictures)
    drawn = scenes.draw([scenes.describe(seed) for seed in range(len(prompts))], 64, 64)[0]
    with torch.no_grad():
        ours, kept = family_qwen.text(small_qwen, prompts, family_qwen.encode_image(small_qwen, drawn), "cpu")
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    assert torch.equal(kept, mask.bool())
    close(ours[kept], embeds[kept])


def test_text_without_images_has_no_image_tokens(small_qwen):
    features = family_qwen.text(small_qwen, ["make it greyscale"], None, "cpu")
    seen = family_qwen.encode_image(small_qwen, torch.zeros(1, 3, 64, 64))
    assert family_qwen.text(small_qwen, ["make it greyscale"], seen, "cpu")[0].shape[1] == 4 + features[0].shape[1]


def test_probe_inputs_are_the_tokens_after_the_prompt(small_qwen):
    prompts = ["make it greyscale", "place a small red circle at the bottom left of the image"]
    together = family_qwen.probe_inputs(family_qwen.text(small_qwen, prompts, None, "cpu"))[0]
    assert together.shape == (2, family_qwen.ENDING, 192)
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert small_qwen.prompt_template_encode.endswith("{}" + tail)
    assert len(small_qwen.tokenizer(tail).input_ids) == family_qwen.ENDING
    alone = family_qwen.text(small_qwen, prompts[:1], None, "cpu")[0]
    close(together[:1], alone[:, -family_qwen.ENDING :])


def test_velocity_matches_the_pipelines_first_step(small_qwen, monkeypatch):
    """The batch that training makes of a task, in the transformer, is the sampler's own call."""
    seed = 3
    case = scenes.sample(seed, 64)
    calls, forward = [], small_qwen.transformer.forward

    def watch(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls.append((kwargs, out[0]))
        return out

    monkeypatch.setattr(small_qwen.transformer, "forward", watch)
    small_qwen(
        case.source, case.prompt, num_inference_steps=2, output_type="latent", true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    given, expected = calls[0]
    with torch.no_grad():
        batch = encode(small_qwen, [scenes.describe(s) for s in range(seed, seed + 1)], (64, 64), "cpu")
        features = family_qwen.text(small_qwen, batch.prompts, batch.vision, "cpu")
        x = given["hidden_states"][:, :16]
        # Encoding in training is in bfloat16, so the reference is taken from the pipeline.
        torch.testing.assert_close(batch.source, given["hidden_states"][:, 16:], rtol=0.05, atol=0.05)
        source = given["hidden_states"][:, 16:]
        ours = family_qwen.velocity(small_qwen, x, source, batch.grid, given["timestep"], features)
    close(ours, expected[:, :16], 1e-4)


def test_some_prompts_are_dropped_but_never_all():
    qwen = family_qwen.QWEN
    draw = dict(generator=torch.Generator().manual_seed(0))
    prompts, has_prompt = drop_prompts(["a"] * 4000, qwen, **draw)
    assert prompts.count(" ") / 4000 == pytest.approx(qwen.empty_prompts, abs=0.02)
    assert [p == "a" for p in prompts] == has_prompt.tolist()
    assert all(drop_prompts(["a"], qwen, **draw)[0] == ["a"] for _ in range(100))


def test_stock_flops_count_both_prompts(small_qwen):
    case, config = scenes.sample(3, 128), small_qwen.transformer.config
    lengths = [small_qwen.encode_prompt(p, image=case.source)[0].shape[1] for p in (case.prompt, " ")]
    passes = [transformer_flops(config, 2 * 64 + length) for length in lengths]
    assert stock_flops(small_qwen, case, 50) == pytest.approx(50 * sum(passes))
    unguided = micro.arguments(case.source, "qwen") | {"true_cfg_scale": 1.0}
    assert stock_flops(small_qwen, case, 2, unguided) == pytest.approx(2 * passes[0])


def test_packing_matches_the_pipeline(small_qwen):
    batch = encode(small_qwen, [scenes.describe(s) for s in loop.seeds(0, 2)], (64, 96), "cpu")
    assert batch.source.shape == batch.target.shape == (2, 24, 64) and batch.grid == (4, 6)
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pack(latents), small_qwen._pack_latents(latents, 2, 16, 8, 12))

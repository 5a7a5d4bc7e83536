"""The released sizes, counted without weights; tiny ones run."""

import pytest
import torch

from benchmarks import real_models


@pytest.mark.parametrize(
    ("model", "transformer", "autoencoder"),
    [("flux-kontext", 11.90e9, 83.8e6), ("qwen-image-edit", 20.43e9, 126.9e6), ("flux2-klein-4b", 3.876e9, 84.0e6)],
)
def test_the_released_sizes(model, transformer, autoencoder):
    if model not in real_models.MODELS:
        pytest.skip("this diffusers has no FLUX.2")
    pipe = real_models.MODELS[model]("meta", torch.bfloat16)
    for part, expected in ((pipe.transformer, transformer), (pipe.vae, autoencoder)):
        parameters = list(part.parameters())
        assert sum(p.numel() for p in parameters) == pytest.approx(expected, rel=1e-3)
        assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("model", real_models.MODELS)
def test_tiny_models_edit_a_batch_from_embeddings(model):
    pipe = real_models.MODELS[model]("cpu", torch.float32, tiny=True)
    with real_models.conditioned_small(64 * 96):
        given = real_models.arguments(pipe, 64, 96, 2)
        out = pipe(**given, num_inference_steps=2, output_type="pt").images
    assert out.shape == (2, 3, 64, 96) and out.isfinite().all() and out.std() > 0


@pytest.mark.thorough
def test_prompts_have_realistic_lengths():
    meta = {name: build("meta", torch.bfloat16) for name, build in real_models.MODELS.items()}
    flux = real_models.arguments(meta["flux-kontext"], 64, 64, 3)
    assert flux["prompt_embeds"].shape == (3, 512, 4096) and flux["pooled_prompt_embeds"].shape == (3, 768)
    qwen = real_models.arguments(meta["qwen-image-edit"], 64, 64, 1)
    assert qwen["prompt_embeds"].shape == (1, 1400, 3584)
    assert qwen["negative_prompt_embeds"].shape[:2] == qwen["negative_prompt_embeds_mask"].shape == (1, 1352)

"""Loading an embedded editor on a CPU stores its convolutions channels-last."""

import pytest
import torch

from specedit.micro.editors import editor_named
from specedit.micro.loading import WEIGHTS, load


@pytest.mark.slow
def test_channels_last_changes_strides_and_not_values(tmp_path):
    laid, plain = load("qwen").vae, editor_named("qwen").load(WEIGHTS / "qwen", torch_dtype=torch.float32).vae
    picture, results = torch.rand(1, 3, 1, 64, 96) * 2 - 1, []
    for vae in (laid, plain):
        deep = [p for p in vae.parameters() if p.ndim == 5 and p.shape[1] > 1 and p[0, 0].numel() > 1]
        assert deep and all((p.stride(1) == 1) == (vae is laid) for p in deep)
        with torch.no_grad():
            latents = vae.encode(picture).latent_dist.mean
            results.append((latents, vae.decode(latents).sample))
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)
    laid.save_pretrained(tmp_path)
    again = type(laid).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in plain.state_dict().items())

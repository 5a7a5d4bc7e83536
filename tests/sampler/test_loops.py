"""The whole loop against loops written out here."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import specedit
from specedit.models.flux import FluxKontext
from tests.sampler.common import CENTRE, CORNER, QUICK, close, count_calls, unpacked

FULL = np.ones((8, 8), dtype=bool)


def shifted(tokens, start, end, steps):
    """Sigmas of FLUX: uniform times from `start` to `end` under sigma = a t / (1 + (a - 1) t), a = exp(mu)."""
    a = np.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    t = np.linspace(*(s / (a - (a - 1) * s) for s in (start, end)), steps + 1)
    return a * t / (1 + (a - 1) * t)


def euler(pipe, latents, reference, sigmas, prompt="make it red"):
    """Plain Euler steps of latents (1, 4, h, w) beside a reference of the same size, through the stock transformer."""
    _, _, h, w = latents.shape
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, None, max_sequence_length=16)
    ids = pipe._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    tokens, beside = (pipe._pack_latents(x, 1, 4, h, w) for x in (latents, reference))
    for sigma, following in pairwise(sigmas):
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=torch.cat([tokens, beside], 1), timestep=torch.tensor([sigma], dtype=torch.float32),
                guidance=torch.tensor([3.5]), pooled_projections=pooled, encoder_hidden_states=embeds,
                txt_ids=text_ids, img_ids=torch.cat([ids, reference_ids]), return_dict=False,
            )[0][:, : tokens.shape[1]]  # fmt: skip
        tokens = tokens + (following - sigma) * velocity
    return pipe._unpack_latents(tokens, 8 * h, 8 * w, 8)


@pytest.mark.parametrize("size", [(128, 128), (144, 176)])
def test_full_steps_alone_are_the_stock_pipeline(pipe, edit, size):
    stock = edit(pipe, size, num_inference_steps=4)
    specedit.install(pipe, steps=(0, 0, 4))
    close(edit(pipe, size), stock)


def test_full_steps_alone_are_the_stock_pipeline_under_true_cfg(pipe, edit):
    guided = dict(negative_prompt="dull", true_cfg_scale=3.0)
    stock = edit(pipe, num_inference_steps=3, **guided)
    assert (stock - edit(pipe, num_inference_steps=3)).abs().max() > 1e-3
    specedit.install(pipe, steps=(0, 0, 3))
    close(edit(pipe, **guided), stock)


def test_everything_expanded_is_plain_full_resolution(pipe, edit, start):
    noise, reference = start
    middle = euler(pipe, noise, reference, shifted(64, 1.0, 0.4, 3))
    expected = euler(pipe, middle, reference, shifted(64, 0.4, 0.0, 2))
    specedit.install(pipe, steps=(0, 3, 2), boundaries=(0.7, 0.4))
    calls = count_calls(pipe)
    close(unpacked(pipe, edit(pipe, edit_mask=FULL)), expected)
    assert calls == {128: 5}


def test_coarse_then_full_resolution(pipe, edit, start):
    noise, reference = start
    # Half the size: white noise is the sum coefficient of each 2 x 2, the reference its mean.
    z = euler(pipe, F.avg_pool2d(noise, 2) * 2, F.avg_pool2d(reference, 2), shifted(16, 1.0, 0.6, 2))
    # Each pixel becomes (z ± s n1 ± s n2 ± s n3) / (1 + s), with the detail of the noise that the sum left out.
    up = lambda x: F.interpolate(x, scale_factor=2, mode="nearest")  # noqa: E731
    detail = noise - up(F.avg_pool2d(noise, 2))  # (± n1 ± n2 ± n3) / 2
    state = (up(z) + 0.6 * 2 * detail) / 1.6
    expected = euler(pipe, state, reference, shifted(64, 1.2 / 1.6, 0.0, 3))
    for steps in ((2, 0, 3), (2, 3, 0)):
        specedit.install(pipe, steps=steps, boundaries=(0.6, 0.3))
        close(unpacked(pipe, edit(pipe, edit_mask=FULL)), expected)


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_a_sequence_with_nothing_locked_is_stock_attention(pipe, edit, attention):
    specedit.install(pipe, steps=(1, 2, 1), attention="stock")
    stock = edit(pipe, edit_mask=FULL)
    specedit.install(pipe, steps=(1, 2, 1), attention=attention)
    close(edit(pipe, edit_mask=FULL), stock)


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("key_bias", ["area", "none"])
def test_attention_stock_and_torch_agree(pipe, edit, key_bias, restore):
    results = []
    for attention in ("stock", "torch", "auto"):
        specedit.install(pipe, **QUICK, key_bias=key_bias, restore=restore, attention=attention)
        results.append(edit(pipe, edit_mask=CORNER))
    close(results[0], results[1])
    close(results[1], results[2])


def test_a_perfect_model_restores_what_is_locked(pipe, edit, start, monkeypatch):
    # A velocity that always points to the reference, at every token's own resolution, must end at the reference.
    def velocity(self, run, group, sigma):
        return (group.tokens - group.layout.from_full_grid(run.state.aligned[group.rows])) / sigma

    monkeypatch.setattr(FluxKontext, "velocity", velocity)
    _, reference = start
    for restore in ("full", "reference"):
        specedit.install(pipe, steps=(2, 2, 1), restore=restore)
        torch.testing.assert_close(unpacked(pipe, edit(pipe, edit_mask=CENTRE)), reference, rtol=1e-4, atol=1e-4)

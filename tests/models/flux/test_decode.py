"""Decoder features and images of the FLUX adapter."""

import numpy as np
import torch

from specedit.layout import MixedLayout
from tests.models.flux.common import random_like


def test_features_are_what_the_decoder_computes(prepare):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    tokens = random_like(MixedLayout.all_fine(state.grid))
    decoder, seen, handles = pipe.vae.decoder, [], []
    for module in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        handles.append(module.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    adapter.decode(pipe, state, tokens, "pt")
    expected = list(seen)
    got = adapter.features(pipe, tokens, state.grid)
    for handle in handles:
        handle.remove()
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_decode_is_the_stock_pipelines(prepare):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    tokens = random_like(MixedLayout.all_fine(state.grid))
    assert adapter.decode(pipe, state, tokens, "latent") is tokens
    latents = pipe._unpack_latents(tokens, 144, 112, 8) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(adapter.decode(pipe, state, tokens, "pt"), expected)
    image = adapter.decode(pipe, state, tokens, "pil")[0]
    assert image.size == (112, 144)
    rounded = (adapter.decode(pipe, state, tokens, "np")[0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(image), rounded)

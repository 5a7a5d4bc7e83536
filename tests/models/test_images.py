"""Pictures as callers give them, and the decoder's features."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from specedit.models.shared.images import (
    check_decoder,
    check_image,
    check_pictures,
    decoder_features,
    pictures_of,
    source_pictures,
)


def test_check_image_returns_the_size():
    for image in (Image.new("RGB", (80, 64)), np.zeros((64, 80, 3)), torch.zeros(2, 3, 64, 80)):
        assert check_image(image) == (64, 80)


def test_check_pictures_lists_them():
    one, other = Image.new("RGB", (80, 64)), Image.new("RGB", (64, 64))
    assert check_pictures(one) == [one] and check_pictures([one, other]) == [one, other]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "at least one picture, got an empty list"),
        (None, TypeError, "a PIL image or a list of them, got NoneType"),
        ([Image.new("RGB", (80, 64)), "a.png"], TypeError, "a PIL image or a list of them, got str"),
        (torch.zeros(3, 64, 64), TypeError, "a PIL image or a list of them, got Tensor"),
        (Image.new("L", (80, 64)), ValueError, "an RGB picture, got mode 'L'"),
        (Image.new("RGB", (80, 0)), ValueError, "at least 1 px a side, got 80 x 0"),
    ],
)
def test_bad_pictures(image, error, message):
    with pytest.raises(error, match=f"image: expected {message}"):
        check_pictures(image)


def test_pictures_of_a_call_are_a_list_of_single_pictures():
    picture, array, tensor = Image.new("RGB", (64, 48)), np.zeros((48, 64, 3)), torch.zeros(3, 48, 64)
    assert pictures_of(picture) == [picture] and pictures_of([picture, picture]) == [picture, picture]
    for given in (array, [array], array[None], [array[None]]):
        assert [one.shape for one in pictures_of(given)] == [(48, 64, 3)]
    both = torch.stack([tensor, tensor + 0.5])
    assert [float(one.mean()) for one in pictures_of(both)] == [0.0, 0.5]
    assert len(pictures_of([both, tensor])) == 3


def test_pictures_of_a_call_are_checked():
    with pytest.raises(ValueError, match="expected at least one picture, got an empty list"):
        pictures_of([])
    with pytest.raises(TypeError, match="expected a PIL image, array or tensor, got str"):
        pictures_of([Image.new("RGB", (8, 8)), "picture.png"])
    bright = torch.full((3, 8, 8), 200.0)
    assert len(pictures_of(bright)) == 1  # values are only read on demand
    with pytest.raises(ValueError, match="expected floating point values"):
        pictures_of(bright, values=True)


def test_source_pictures_at_their_own_size_are_the_pixels(picture):
    pipe = SimpleNamespace(vae_scale_factor=8)
    given = picture(64, 96)
    pixels = torch.from_numpy(np.array(given)).permute(2, 0, 1) / 255
    assert torch.equal(source_pictures(pipe, [given], 64, 96)[0], pixels)
    assert source_pictures(pipe, [given, given], 32, 64).shape == (2, 3, 32, 64)
    signed = pixels * 2 - 1  # values in -1..1 are taken for what they are
    torch.testing.assert_close(source_pictures(pipe, [signed], 64, 96)[0], pixels)


@pytest.mark.parametrize("components", ["tiny_components", "qwen_components"])
@pytest.mark.parametrize("parts", ["use_tiling", "use_slicing", None])
def test_features_of_an_offloaded_decoder_are_the_same(request, components, parts):
    vae = copy.deepcopy(request.getfixturevalue(components)["vae"])
    frame = () if components == "tiny_components" else (1,)
    latents = torch.randn(2, 4, *frame, 6, 40, generator=torch.Generator().manual_seed(0))  # wider than a tile
    with torch.no_grad():
        plain = decoder_features(vae, latents)
        vae._hf_hook = object()  # what accelerate leaves behind
        if parts is not None:
            assert getattr(vae, parts) is False
            setattr(vae, parts, True)
        hooked = decoder_features(vae, latents)
    assert parts is None or getattr(vae, parts) is True
    assert len(plain) == len(hooked) == 3
    for a, b in zip(plain, hooked, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(module._forward_hooks for module in vae.modules())


def test_verification_under_model_offloading_leaves_the_other_models_where_they_are(tiny_components, monkeypatch):
    from accelerate import cpu_offload_with_hook

    vae = copy.deepcopy(tiny_components["vae"])
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = decoder_features(vae, latents)
        cpu_offload_with_hook(vae, "cpu")
        calls = []  # of what takes the model before away
        monkeypatch.setattr(vae._hf_hook, "pre_forward", lambda module, *given: calls.append(module) or (given, {}))
        features = decoder_features(vae, latents)
        assert not calls
        vae.decode(latents)
    assert calls == [vae]  # as a whole decode does
    for a, b in zip(plain, features, strict=True):
        assert torch.equal(a, b)


def test_a_decoder_without_the_layers_of_verification():
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=4,
                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(ValueError, match=r"vae: expected a decoder with conv_in.*got AutoencoderTiny; selector="):
        check_decoder(vae)


@pytest.mark.parametrize("value", [200.0, -3.0, float("nan"), float("inf")])
def test_values_of_another_scale(value):
    for image in (np.full((64, 64, 3), value), torch.full((1, 3, 64, 64), value)):
        with pytest.raises(
            ValueError, match=f"image: expected floating point values in 0..1, got values from {value:g}"
        ):
            check_image(image)
    assert check_image(torch.full((3, 64, 80), 1.01)) == check_image(torch.full((3, 64, 80), -1.0)) == (64, 80)

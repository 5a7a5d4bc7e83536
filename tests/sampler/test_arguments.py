"""The other arguments of a call, and what it returns."""

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.method.restore import feather
from tests.sampler.common import CENTRE, CORNER, QUICK, close, unpacked


def test_latents_argument_replaces_the_noise(pipe, edit, start):
    noise, _ = start
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    packed = pipe._pack_latents(noise, 1, 4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 16, 16, generator=generator)  # what the pipeline itself would have drawn
    assert torch.equal(edit(pipe, latents=packed, generator=generator), expected)
    other = edit(pipe, latents=-packed, generator=torch.Generator().manual_seed(0))
    assert (other - expected).abs().max() > 1e-2


def test_prompt_embeds(pipe, edit):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)
    close(edit(pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled), expected)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        edit(pipe, prompt=None)


def test_embeddings_of_one_prompt_serve_several_pictures(pipe, edit):
    """Stock does not repeat them, and they broadcast."""
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)
    given = dict(prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=2)
    generators = lambda: [torch.Generator().manual_seed(i) for i in (3, 4)]  # noqa: E731
    stock = edit(pipe, generator=generators(), num_inference_steps=2, **given)
    specedit.install(pipe, **QUICK)
    of_words = edit(pipe, num_images_per_prompt=2, generator=generators())
    assert stock.shape == of_words.shape == (2, 64, 16)
    close(edit(pipe, generator=generators(), **given), of_words)
    negative = {
        f"negative_{name}": value for name, value in zip(("prompt_embeds", "pooled_prompt_embeds"), (embeds, pooled))
    }
    guided = edit(pipe, num_images_per_prompt=2, generator=generators(), true_cfg_scale=3.0, **negative)
    close(guided, of_words)  # away from what it is led to


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_output_types(pipe, edit, kind):
    specedit.install(pipe, **QUICK)
    latents = unpacked(pipe, edit(pipe)) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    image = edit(pipe, output_type=kind)
    if kind == "pt":
        close(image, expected)
    else:
        expected = expected.permute(0, 2, 3, 1).numpy()
        if kind == "pil":
            assert [type(i) for i in image] == [Image.Image]
            image, expected = np.asarray(image[0], dtype=int)[None], (expected * 255).round().astype(int)
        assert image.shape == expected.shape and np.abs(image - expected).max() <= (1 if kind == "pil" else 1e-5)


def test_return_dict(pipe, picture):
    specedit.install(pipe, **QUICK)
    call = dict(
        prompt="a", height=128, width=128, max_area=128 * 128, _auto_resize=False, max_sequence_length=16,
        output_type="latent",
    )  # fmt: skip
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    plain = pipe(picture(), **call, generator=seeded(), return_dict=False)
    wrapped = pipe(picture(), **call, generator=seeded())
    assert type(plain) is tuple and len(plain) == 1
    assert type(wrapped).__name__ == "FluxPipelineOutput" and torch.equal(wrapped.images, plain[0])


@pytest.mark.parametrize("given", ["pil", "pt"])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_keep_pixels_is_exact_outside_the_edit(pipe, edit, picture, kind, given):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = picture()
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    if given == "pt":
        image = values = values * 0.7001 + 0.01  # not multiples of 1 / 255
    out = edit(pipe, image=image, edit_mask=CENTRE, output_type=kind)
    if kind == "pil":
        out = torch.from_numpy(np.array(out[0])).permute(2, 0, 1)[None]
        values = (values * 255).round().to(torch.uint8)
    elif kind == "np":
        out = torch.from_numpy(out).permute(0, 3, 1, 2)
    weight = feather(specedit.report(pipe).edit_mask, 32, 8, (128, 128))[:, None].expand_as(out)
    assert torch.equal(out[weight == 0], values[weight == 0]) and (weight == 0).any()
    assert (out[weight == 1] != values[weight == 1]).float().mean() > 0.9


def test_keep_pixels_of_another_size(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = picture(96, 160)
    out = np.asarray(edit(pipe, image=image, edit_mask=CORNER, output_type="pil")[0])
    # The mask is the picture's: it reaches row 45 and column 75. Below row 96 there is no picture.
    own = np.asarray(image)[:, :128]
    assert np.array_equal(out[64:96], own[64:]) and np.array_equal(out[:96, 96:], own[:, 96:])
    assert specedit.report(pipe).edit_mask[0].int().tolist() == [[1, 1, 1, 0]] * 2 + [[0] * 4] + [[1] * 4]


def test_keep_pixels_without_any_mask_returns_the_edit_and_warns(pipe, edit, picture):
    specedit.install(pipe, steps=(1, 1, 1), selector="uniform", keep_pixels=True)
    with pytest.warns(UserWarning, match="^keep_pixels not applied"):
        out = edit(pipe, output_type="pt")
    specedit.install(pipe, steps=(1, 1, 1), selector="uniform", keep_pixels=False, uniform_stride=1)
    close(edit(pipe, output_type="pt"), out)


def test_joint_attention_kwargs_reach_the_transformer(pipe, edit, monkeypatch):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe, edit_mask=CORNER)
    scales = []

    def note(module, args, kwargs):
        scales.append(kwargs["joint_attention_kwargs"].get("scale"))

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    given = {"scale": 0.5}
    close(edit(pipe, edit_mask=CORNER, joint_attention_kwargs=given), expected)  # no LoRA is loaded
    assert scales == [0.5] * 6 and given == {"scale": 0.5}
    assert pipe.joint_attention_kwargs == {"scale": 0.5}

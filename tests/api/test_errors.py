"""What goes wrong in a call: a clear error, and a pipeline that works afterwards."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

import specedit
from specedit.api.installing import is_active
from specedit.models.flux import FluxKontext
from tests.api.common import CORNER, QUICK


def test_an_exception_in_a_callback(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    for step in range(3):

        def callback(pipe, index, timestep, kwargs, step=step):
            if index == step:
                raise KeyError("mine")
            return {}

        with pytest.raises(KeyError, match="mine"):
            edit(pipe, callback_on_step_end=callback)
        assert pipe.current_timestep is None
        assert torch.equal(edit(pipe), expected)
    check()


def test_a_decoder_that_cannot_verify_is_named_before_the_draft(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    vae, calls = pipe.vae, []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    specedit.install(pipe, **QUICK)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=4,
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"vae: expected a decoder with conv_in.*got AutoencoderTiny"):
        edit(pipe)
    assert not calls
    pipe.vae = vae
    handle.remove()
    edit(pipe)
    check()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (["latents"], TypeError, "expected a dict or None, got list"),
        (dict(latents="x"), TypeError, "expected latents as a tensor, got str"),
        (dict(latents=torch.zeros(1, 3, 16)), ValueError, r"latents of shape \(1, 64, 16\), got \(1, 3, 16\)"),
        (dict(prompt_embeds=torch.zeros(1, 3, 32)), ValueError, r"of shape \(1, 16, 32\), got \(1, 3, 32\)"),
    ],
)
def test_a_wrong_answer_of_a_callback(pipe, edit, check_untouched, answer, error, message):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    with pytest.raises(error, match=f"callback_on_step_end: .*{message}"):
        edit(pipe, callback_on_step_end=lambda *_: answer)
    assert torch.equal(edit(pipe), expected)
    assert torch.equal(edit(pipe, callback_on_step_end=lambda *_: None), expected)
    check()


def test_ctrl_c_in_the_middle_of_a_run(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)

    def stop(pipe, index, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=stop)
    with pytest.raises(ValueError, match="at least one accelerated call"):
        specedit.report(pipe)  # the run that was stopped has none
    assert pipe.current_timestep is None and torch.equal(edit(pipe), expected)
    check()


@pytest.mark.slow
def test_an_exception_in_the_transformer(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    for failing in range(4):  # the draft, then every stage
        calls = []

        def fail(module, inputs, calls=calls, failing=failing):
            calls.append(1)
            if len(calls) > failing:
                raise MemoryError("out of it")

        handle = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError, match="out of it"):
            edit(pipe)
        handle.remove()
        assert len(calls) == failing + 1 and torch.equal(edit(pipe), expected)
    check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(image=Image.new("RGBA", (128, 128))), ValueError, "expected an RGB picture, got mode 'RGBA'"),
        (dict(image=Image.new("L", (128, 128))), ValueError, "expected an RGB picture, got mode 'L'"),
        (dict(image=Image.new("RGB", (15, 40))), ValueError, "expected at least 16 px a side, got 15 x 40"),
        (dict(image="photo.png"), TypeError, "expected a PIL image, array or tensor, got str"),
        (dict(edit_mask=np.zeros((5, 5))), ValueError, "expected some nonzero pixels, got an empty mask"),
        (dict(edit_mask=np.full((5, 5), np.nan)), ValueError, "expected finite values, got NaN"),
        (dict(edit_mask=np.ones((3, 5, 5))), ValueError, "expected 1 mask, got 3"),
        (dict(edit_mask=np.ones((2, 3, 5, 5))), ValueError, r"expected \(H, W\).*got \(2, 3, 5, 5\)"),
        (dict(edit_mask="all"), TypeError, "edit_mask: expected a PIL image, array or tensor, got str"),
        (dict(image=np.full((128, 128, 3), 200.0)), ValueError, "values in 0..1, got values from 200 to 200"),
        (dict(image=torch.full((3, 128, 128), torch.nan)), ValueError, "image: expected finite values, got NaN"),
        (dict(image=[Image.new("RGB", (128, 128))] * 2), ValueError, "image: expected one .* fit 1 edits, got 2"),
        (dict(latents=torch.zeros(1, 9, 16)), ValueError, r"latents: expected shape \(1, 64, 16\), got \(1, 9, 16\)"),
        (dict(latents=torch.zeros(2, 64, 16)), ValueError, r"latents: expected .*, got \(2, 64, 16\)"),
        (dict(height=-16), ValueError, "height: expected a number above 0, got -16"),
        (dict(max_area=0), ValueError, "max_area: expected a number above 0, got 0"),
        (dict(height=16, max_area=128), ValueError, "height, width: expected at least 16 px a side, got 4 x 32"),
        (dict(prompt=7), ValueError, "`prompt` has to be of type"),
        (dict(max_sequence_length=600), ValueError, "cannot be greater than 512"),
        (dict(no_such_argument=1), TypeError, "no_such_argument"),
    ],
)
def test_bad_arguments_leave_the_pipeline_usable(pipe, edit, check_untouched, arguments, error, message):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    with pytest.raises(error, match=message):
        edit(pipe, **arguments)
    assert torch.equal(edit(pipe), expected)
    check()


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (100, 37), (700, 900)])
def test_masks_of_any_size(pipe, edit, size):
    specedit.install(pipe, **QUICK)
    everything = edit(pipe, edit_mask=np.ones((128, 128)))
    assert torch.equal(edit(pipe, edit_mask=np.ones(size, dtype=np.uint8)), everything)
    assert specedit.report(pipe).edit_fraction == 1


def test_attention_that_cannot_run_here_does_not_fall_back(pipe, edit, check_untouched):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK, attention="triton")
    with pytest.raises(ValueError, match="expected CUDA tensors"):
        edit(pipe)
    check()


def test_prompts_of_different_length_are_refused(pipe, edit):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="negative prompt: expected encoder_hidden_states of shape"):
        edit(pipe, prompt=["a", "b"], negative_prompt=["c", "d", "e"], true_cfg_scale=2.0)


@pytest.mark.slow
def test_a_huge_picture(pipe, edit, picture, monkeypatch):
    monkeypatch.setattr("specedit.models.flux.PREFERRED_KONTEXT_RESOLUTIONS", [(128, 160)])
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = picture(3000, 4000)
    out = np.asarray(edit(pipe, image=image, _auto_resize=True, edit_mask=CORNER, output_type="pil")[0])
    resized = np.asarray(image.resize((128, 160), Image.Resampling.LANCZOS))[:128]  # the model takes all of it
    assert out.shape == (128, 128, 3) and np.array_equal(out[96:], resized[96:])


@pytest.mark.parametrize(
    ("offer", "fields", "message"),
    [
        ("skips_tokens", dict(locked="cached"), "expected 'coarse' or 'reference' for flux-kontext.*, got 'cached'"),
        ("encodes_pixels", dict(restore="pixels"), "expected 'full' or 'reference' for flux-kontext.*, got 'pixels'"),
        ("decodes_boxes", dict(decode="edited", keep_pixels=True), "expected 'full' for flux-kontext.*, got 'edited'"),
        ("measures_attention", dict(reference_keep=0.5), r"expected None for flux-kontext.*, got 0\.5"),
        ("keeps_reference", dict(reference_refresh=2), "expected None for flux-kontext.*, got 2"),
        ("token_wise", dict(forecast="toca"), "'toca' computes single tokens again, which flux-kontext does not"),
    ],
)
def test_what_a_model_does_not_offer_is_refused_when_it_is_installed(pipe, edit, monkeypatch, offer, fields, message):
    monkeypatch.setattr(FluxKontext, offer, False)
    for before in ({}, QUICK):
        if before:
            specedit.install(pipe, **before)
        with pytest.raises(ValueError, match=f"^{next(iter(fields))}: {message}"):
            specedit.install(pipe, **fields)
        assert is_active(pipe) == bool(before)
    edit(pipe)
    assert specedit.report(pipe).config.steps == QUICK["steps"]

"""Inpainting pipelines: the call's own mask is the edit mask, and what it leaves stays as stock leaves it."""

import numpy as np
import pytest
import torch
from PIL import Image

import specedit

from .conftest import EVERYTHING, SIZE, mask_of, token_mask

QUICK = dict(steps=(1, 2, 1), uniform_stride=0)


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_the_mask_leaves_is_what_stock_leaves(inpaint, pipe, restore, strength):
    stock, changes = inpaint(pipe, strength=strength), token_mask()
    specedit.install(pipe, **QUICK, restore=restore)
    ours = inpaint(pipe, strength=strength)
    torch.testing.assert_close(ours[:, ~changes], stock[:, ~changes], rtol=1e-5, atol=1e-5)
    assert (ours[:, changes] - stock[:, changes]).abs().max() > 1e-3 and torch.isfinite(ours).all()
    report = specedit.report(pipe)
    assert report.draft_steps == 0 and report.empty_drafts == 0 and report.flops < report.flops_stock


@pytest.mark.parametrize(
    "mask",
    [
        mask_of().convert("RGB"), mask_of().resize((384, 192), Image.Resampling.NEAREST),
        np.array(mask_of())[None, ..., None] / 255, torch.from_numpy(np.array(mask_of()) / 255)[None, None],
    ],
    ids=["rgb", "another size", "array", "tensor"],
)  # fmt: skip
def test_every_form_of_mask(inpaint, pipe, mask):
    specedit.install(pipe, **QUICK)
    inpaint(pipe)
    expected = specedit.report(pipe).edit_mask
    inpaint(pipe, mask_image=mask)
    assert torch.equal(specedit.report(pipe).edit_mask, expected) and 0 < expected.float().mean() < 1


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_mask_is_read_once_a_call(inpaint, pipe, monkeypatch, strength):
    specedit.install(pipe, **QUICK)
    read, original = [], type(pipe.mask_processor).preprocess

    def preprocess(self, *args, **kwargs):
        if self is pipe.mask_processor:
            read.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.mask_processor), "preprocess", preprocess)
    inpaint(pipe, strength=strength)
    assert len(read) == 1
    inpaint(pipe, strength=strength)
    assert len(read) == 2


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_masks_of_a_batch_are_tiled_as_in_stock(inpaint, pipe, picture, strength):
    masks, pictures = [mask_of(), mask_of((slice(64, 96), slice(0, 32)))], [picture(*SIZE)] * 2
    several = dict(prompt=["red", "rod"], num_images_per_prompt=2, image=pictures, mask_image=masks, strength=strength)
    stock = inpaint(pipe, **several)
    specedit.install(pipe, **QUICK)
    ours = inpaint(pipe, **several)
    for i in range(4):
        kept = ~token_mask(masks[i % 2])
        torch.testing.assert_close(ours[i, kept], stock[i, kept], rtol=1e-5, atol=1e-5)
    assert not torch.equal(*specedit.report(pipe).edit_mask[:2])


def test_pictures_of_a_batch_are_tiled_as_in_stock(inpaint, pipe, picture):
    pictures = [picture(*SIZE), picture(*SIZE, seed=5)]
    several = dict(prompt=["red", "rod"], num_images_per_prompt=2, image=pictures, mask_image=EVERYTHING, strength=0.6)
    stock = inpaint(pipe, **several)
    specedit.install(pipe, steps=(0, 0, 4))
    ours = inpaint(pipe, **several)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(padding_mask_crop=8, output_type="pil"), "padding_mask_crop edits a crop"),
        (dict(mask_image=Image.new("L", SIZE[::-1])), "mask_image is empty"),
    ],
)
def test_other_calls_run_stock_and_say_why(inpaint, pipe, change, reason):
    change = dict(height=SIZE[0], width=SIZE[1]) | change
    expected = inpaint(pipe, **change)
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match=reason):
        assert np.array_equal(np.asarray(inpaint(pipe, **change)), np.asarray(expected))
    with pytest.raises(ValueError, match=reason):
        specedit.report(pipe)


@pytest.mark.parametrize("inpaint", ["kontext", "klein"], indirect=True)
def test_given_latents_are_stocks_where_they_are_the_noised_picture(inpaint, pipe):
    shape = (1, 4, 12, 24) if inpaint.name == "kontext" else (1, 16, 6, 12)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = [inpaint(pipe, latents=latents, strength=s, mask_image=EVERYTHING) for s in (1.0, 0.6)]
    specedit.install(pipe, steps=(0, 0, 4))
    whole = inpaint(pipe, latents=latents, mask_image=EVERYTHING)
    torch.testing.assert_close(whole, expected[0], rtol=1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="latents with strength=0.6 are taken for the noised picture"):
        again = inpaint(pipe, latents=latents, strength=0.6, mask_image=EVERYTHING)
    assert torch.equal(again, expected[1])


@pytest.mark.parametrize("inpaint", ["kontext"], indirect=True)
def test_another_picture_as_reference_runs_stock(inpaint, pipe):
    change = dict(image_reference=Image.new("RGB", SIZE[::-1]))
    expected = inpaint(pipe, **change)
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="image_reference is another picture"):
        assert torch.equal(inpaint(pipe, **change), expected)


@pytest.mark.parametrize("inpaint", ["klein"], indirect=True)
def test_another_picture_is_a_second_reference_of_klein(inpaint, pipe, picture):
    change = dict(image_reference=picture(64, 96, seed=9), mask_image=EVERYTHING, strength=0.6)
    stock, alone = inpaint(pipe, **change), inpaint(pipe, **change | dict(image_reference=None))
    specedit.install(pipe, steps=(0, 0, 4))
    torch.testing.assert_close(inpaint(pipe, **change), stock, rtol=1e-3, atol=1e-3)
    assert (stock - alone).abs().max() > 0.01
    change["image_reference"] = np.asarray(change["image_reference"]) / 255
    with pytest.warns(UserWarning, match="image_reference is no PIL picture"):
        inpaint(pipe, **change)


@pytest.mark.parametrize("inpaint", ["klein"], indirect=True)
def test_masks_of_klein_are_soft_at_their_edges(inpaint, pipe):
    mask = mask_of((slice(0, 40), slice(100, 192)))  # the middle of a token's row lies on the edge
    stock = inpaint(pipe, mask_image=mask)
    specedit.install(pipe, **QUICK)
    ours = inpaint(pipe, mask_image=mask)
    kept = ~token_mask(mask)
    torch.testing.assert_close(ours[:, kept], stock[:, kept], rtol=1e-5, atol=1e-5)
    row = slice(2 * 12 + 7, 3 * 12)  # half kept, as 8 of a token's 16 rows are
    whole = mask_of((slice(0, 48), slice(100, 192)))
    reference = inpaint(pipe, mask_image=mask_of((slice(0, 32), slice(100, 192))))[:, row]
    full = inpaint(pipe, mask_image=whole)[:, row]
    torch.testing.assert_close(ours[:, row], (reference + full) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inpaint", ["qwen"], indirect=True)
def test_latents_of_the_masked_picture_run_stock(inpaint, pipe, picture):
    latents = torch.zeros(1, 4, 1, 12, 24)
    expected = inpaint(pipe, masked_image_latents=latents)
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="masked_image_latents are read by the stock call alone"):
        assert torch.equal(inpaint(pipe, masked_image_latents=latents), expected)


@pytest.mark.parametrize("inpaint", ["qwen"], indirect=True)
def test_latents_that_qwens_pipeline_fails_with_are_refused(inpaint, pipe):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="latents: expected None, because the stock pipeline fails with given ones"):
        inpaint(pipe, latents=torch.zeros(1, 1, 4, 12, 24))


@pytest.mark.parametrize("strength", [0, -0.5, 1.5, float("nan")])
def test_strengths_out_of_range_are_refused(inpaint, pipe, strength):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match=r"strength: expected a number above 0, at most 1, got"):
        inpaint(pipe, strength=strength)


def test_two_masks_are_refused(inpaint, pipe):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="edit_mask: expected none beside mask_image, which says what may change"):
        inpaint(pipe, edit_mask=mask_of())


def test_a_wrong_number_of_masks_is_named_as_it_was_given(inpaint, pipe):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="mask_image: expected 1 mask, got 3"):
        inpaint(pipe, mask_image=[mask_of()] * 3)


def test_uninstalling_gives_the_stock_pipeline(inpaint, pipe):
    before, cls = inpaint(pipe, strength=0.6), type(pipe)
    specedit.uninstall(specedit.install(pipe, **QUICK))
    assert type(pipe) is cls and torch.equal(inpaint(pipe, strength=0.6), before)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_pictures_keep_their_pixels(inpaint, pipe, picture, strength):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = np.array(inpaint(pipe, output_type="pil", strength=strength)[0])
    source = np.array(picture(*SIZE))
    assert (image[64:] == source[64:]).all() and (image[:48, 96:] != source[:48, 96:]).any()


@pytest.mark.parametrize("inpaint", ["qwen"], indirect=True)
def test_boxes_around_the_mask_are_decoded_alone(inpaint, pipe):
    images = []
    for decode in ("full", "edited"):
        specedit.install(pipe, **QUICK, keep_pixels=True, decode=decode)
        images.append(np.array(inpaint(pipe, output_type="pil", strength=0.6)[0]).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("inpaint", ["kontext"], indirect=True)
def test_the_mask_is_the_edit_mask_of_the_plain_pipeline(inpaint, pipe, make_pipe):
    specedit.install(pipe, **QUICK, restore="reference")
    inpaint(pipe)
    own = specedit.report(pipe)
    plain = specedit.install(make_pipe(), **QUICK, restore="reference")
    height, width = SIZE
    plain(
        image=Image.new("RGB", (width, height)), prompt="make it red", max_sequence_length=16, height=height,
        width=width, max_area=height * width, _auto_resize=False, output_type="latent", num_inference_steps=4,
        edit_mask=mask_of(),
    )  # fmt: skip
    other = specedit.report(plain)
    assert torch.equal(own.edit_mask, other.edit_mask) and own.flops == other.flops
    assert [s.name for s in own.stages] == [s.name for s in other.stages]


@pytest.mark.parametrize("inpaint", ["kontext"], indirect=True)
@pytest.mark.parametrize("method", ["steps", "ralu"])
def test_other_methods_start_from_noise(inpaint, pipe, method):
    specedit.install(pipe, method=method)
    with pytest.warns(UserWarning, match=f"strength=0.5 starts from the picture, and method='{method}' from noise"):
        inpaint(pipe, strength=0.5, num_inference_steps=6)


@pytest.mark.parametrize("inpaint", ["kontext"], indirect=True)
def test_methods_that_edit_everything_keep_what_the_mask_leaves(inpaint, pipe):
    stock, kept = inpaint(pipe), ~token_mask()
    specedit.install(pipe, method="steps")
    ours = inpaint(pipe)
    torch.testing.assert_close(ours[:, kept], stock[:, kept], rtol=1e-5, atol=1e-5)
    assert specedit.report(pipe).edit_mask is None


@pytest.mark.slow
def test_reused_encodings_change_no_bit(inpaint, pipe):
    """Of Qwen's the prompt's: its pipeline draws the picture's latents anew for every seed."""
    calls = [{}, {}, dict(seed=4), dict(strength=0.6)]
    specedit.install(pipe, **QUICK)
    expected = [inpaint(pipe, **call) for call in calls]
    specedit.install(pipe, **QUICK, reuse_encodings=True)
    for i, (call, latents) in enumerate(zip(calls, expected, strict=True)):
        assert torch.equal(inpaint(pipe, **call), latents)
        reused = specedit.report(pipe).reused
        assert ("prompts" in reused) == (i > 0) and ("pictures" in reused) == (i > 0 and inpaint.name != "qwen")


def test_a_lora_acts_as_in_stock(inpaint, pipe, tmp_path):
    peft = pytest.importorskip("peft")
    names, call = ["to_q", "to_k", "to_v"], dict(mask_image=EVERYTHING, strength=0.6)
    plain, other = inpaint(pipe, **call), inpaint.make()
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
    other.transformer.add_adapter(lora)
    weights = peft.get_peft_model_state_dict(other.transformer)
    type(other).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    specedit.install(pipe, steps=(0, 0, 4))
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    with specedit.disabled(pipe):
        stock = inpaint(pipe, **call)
    assert (stock - plain).abs().max() > 1e-3
    torch.testing.assert_close(inpaint(pipe, **call), stock, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(inpaint(pipe, **call), plain, rtol=1e-3, atol=1e-3)

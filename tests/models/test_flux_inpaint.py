"""FLUX.1-Kontext inpainting: the call's own mask is the edit mask, and what it leaves stays as stock leaves it."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextInpaintPipeline
from PIL import Image

import specedit

SIZE = (128, 160)  # height, width
CORNER = (slice(0, 48), slice(64, 160))
QUICK = dict(steps=(1, 2, 1), uniform_stride=0)


def mask_of(*corners, size=SIZE):
    mask = np.zeros(size, np.uint8)
    for corner in corners or (CORNER,):
        mask[corner] = 255
    return Image.fromarray(mask)


@pytest.fixture
def inpaint(make_pipe):
    return make_pipe(FluxKontextInpaintPipeline)


@pytest.fixture
def call(picture):
    height, width = SIZE
    words = dict(image=picture(height, width), mask_image=mask_of(), prompt="make it red", max_sequence_length=16)
    how = dict(max_area=height * width, _auto_resize=False, output_type="latent", num_inference_steps=4)

    def run(pipe, **change):
        return pipe(**words | how | change | dict(generator=torch.Generator().manual_seed(3))).images

    return run


def token_mask(mask=None):
    """(N,) bool: tokens that the mask covers."""
    pixels = torch.from_numpy(np.array(mask or mask_of())) > 127
    return pixels.reshape(SIZE[0] // 16, 16, SIZE[1] // 16, 16).any(3).any(1).flatten()


def test_full_resolution_throughout_is_the_stock_call(inpaint, call):
    everything = mask_of((slice(None), slice(None)))
    stock = call(inpaint, mask_image=everything)
    specedit.install(inpaint, steps=(0, 0, 4))
    torch.testing.assert_close(call(inpaint, mask_image=everything), stock, rtol=1e-3, atol=1e-3)
    assert specedit.report(inpaint).nfe == 4


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_what_the_mask_leaves_is_what_stock_leaves(inpaint, call, restore):
    stock, changes = call(inpaint), token_mask()
    specedit.install(inpaint, **QUICK, restore=restore)
    ours = call(inpaint)
    torch.testing.assert_close(ours[:, ~changes], stock[:, ~changes], rtol=1e-5, atol=1e-5)
    assert (ours[:, changes] - stock[:, changes]).abs().max() > 1e-3 and torch.isfinite(ours).all()


def test_the_mask_is_the_edit_mask_of_the_plain_pipeline(inpaint, make_pipe, call):
    specedit.install(inpaint, **QUICK, restore="reference")
    call(inpaint)
    own = specedit.report(inpaint)
    plain = specedit.install(make_pipe(), **QUICK, restore="reference")
    height, width = SIZE
    plain(
        image=Image.new("RGB", (width, height)), prompt="make it red", max_sequence_length=16, height=height,
        width=width, max_area=height * width, _auto_resize=False, output_type="latent", num_inference_steps=4,
        edit_mask=mask_of(),
    )  # fmt: skip
    other = specedit.report(plain)
    assert torch.equal(own.edit_mask, other.edit_mask) and own.flops == other.flops
    assert own.empty_drafts == 0 and [s.name for s in own.stages] == [s.name for s in other.stages]
    assert "draft" not in {stage.name for stage in own.stages} and own.flops < own.flops_stock


@pytest.mark.parametrize(
    "mask",
    [
        mask_of().convert("RGB"), mask_of(size=SIZE).resize((320, 256), Image.Resampling.NEAREST),
        np.array(mask_of())[None, ..., None] / 255, torch.from_numpy(np.array(mask_of()) / 255)[None, None],
    ],
    ids=["rgb", "another size", "array", "tensor"],
)  # fmt: skip
def test_every_form_of_mask(inpaint, call, mask):
    specedit.install(inpaint, **QUICK)
    call(inpaint)
    expected = specedit.report(inpaint).edit_mask
    call(inpaint, mask_image=mask)
    assert torch.equal(specedit.report(inpaint).edit_mask, expected)


def test_masks_of_a_batch_are_tiled_as_in_stock(inpaint, call):
    masks = [mask_of(), mask_of((slice(96, 128), slice(0, 32)))]
    several = dict(prompt=["red", "blue"], num_images_per_prompt=2, mask_image=masks)
    stock = call(inpaint, **several)
    specedit.install(inpaint, **QUICK)
    ours = call(inpaint, **several)
    for i in range(4):
        kept = ~token_mask(masks[i % 2])
        torch.testing.assert_close(ours[i, kept], stock[i, kept], rtol=1e-5, atol=1e-5)
    assert not torch.equal(*specedit.report(inpaint).edit_mask[:2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(strength=0.5), "strength=0.5 starts from the picture"),
        (dict(padding_mask_crop=8, output_type="pil"), "padding_mask_crop edits a crop"),
        (dict(mask_image=Image.new("L", SIZE[::-1])), "mask_image is empty"),
        (dict(image_reference=Image.new("RGB", SIZE[::-1])), "image_reference is another picture"),
    ],
)
def test_other_calls_run_stock_and_say_why(inpaint, call, change, reason):
    expected = call(inpaint, **change)
    specedit.install(inpaint, **QUICK)
    with pytest.warns(UserWarning, match=reason):
        assert np.array_equal(np.asarray(call(inpaint, **change)), np.asarray(expected))
    with pytest.raises(ValueError, match=reason):
        specedit.report(inpaint)


def test_two_masks_are_refused(inpaint, call):
    specedit.install(inpaint, **QUICK)
    with pytest.raises(ValueError, match="edit_mask: expected none beside mask_image, which says what may change"):
        call(inpaint, edit_mask=mask_of())


def test_uninstalling_gives_the_stock_pipeline(inpaint, call):
    before = call(inpaint)
    specedit.uninstall(specedit.install(inpaint, **QUICK))
    assert type(inpaint) is FluxKontextInpaintPipeline and torch.equal(call(inpaint), before)


def test_pictures_keep_their_pixels(inpaint, call, picture):
    specedit.install(inpaint, **QUICK, keep_pixels=True)
    image = np.array(call(inpaint, output_type="pil")[0])
    source = np.array(picture(*SIZE))
    assert (image[96:] == source[96:]).all() and (image[:48, 64:] != source[:48, 64:]).any()

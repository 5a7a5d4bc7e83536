import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import specedit
from specedit.method import masks

LEFT = np.zeros((16, 16), dtype=np.uint8)
LEFT[:, :8] = 255
COLOURS = np.stack([0 * LEFT, LEFT, LEFT], -1)
OPAQUE = np.full_like(LEFT, 255)


def drawn(mode):
    """LEFT, white on black, as a picture of `mode`."""
    plain = Image.fromarray(LEFT)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(plain.convert("RGB"), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    if mode == "I;16":
        return Image.fromarray(LEFT.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(LEFT.astype(np.int32))
    if mode == "F":
        return Image.fromarray(LEFT.astype(np.float32) / 255)
    if mode in ("La", "PA"):
        return plain.convert("LA").convert(mode)
    if mode in ("RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        return plain.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    return plain.convert(mode)


def keyed(mode):
    """A picture that is white everywhere, with a colour that marks the right half as transparent."""
    picture = Image.fromarray(np.where(LEFT, 255, 254).astype(np.uint8)).convert(mode)
    picture.info["transparency"] = 254 if mode == "L" else (254,) * 3
    return picture


def palette(transparent):
    picture = Image.fromarray((LEFT == 0).astype(np.uint8), "P")  # index 1 on the right
    picture.putpalette([255, 0, 0, 0, 0, 0])
    if transparent:
        picture.putpalette([9, 9, 9, 255, 255, 255])
        picture.info["transparency"] = 1
    return picture


MODES = (
    "1", "L", "LA", "La", "P", "PA", "I", "I;16", "F", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_read_as_displayed(mode):
    assert drawn(mode).mode == mode
    (found,) = masks.read(drawn(mode))
    assert found.dtype == torch.bool and torch.equal(found, torch.from_numpy(LEFT > 0))


@pytest.mark.parametrize("picture", [palette(False), palette(True), keyed("L"), keyed("RGB")])
def test_palettes_and_transparent_colours_are_looked_up(picture):
    assert np.array_equal(masks.read(picture)[0], LEFT > 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "F"])
def test_any_nonzero_pixel_counts(mode):
    values = np.zeros((8, 8, 3), np.uint8)
    values[2, 3] = (0, 0, 1)
    if mode in ("1", "L"):
        mask = Image.fromarray(values[..., 2] * 255).convert(mode)
    elif mode == "F":
        mask = Image.fromarray(values[..., 2].astype(np.float32) * 0.5)
    else:
        mask = Image.fromarray(values * (255 if mode == "P" else 1)).convert(mode)  # a palette has no room for 1
    (found,) = masks.read(mask)
    assert found[2, 3] and found.sum() == 1


BLACK_BRUSH = np.dstack([0 * COLOURS, LEFT])
SOFT_BRUSH = np.dstack([COLOURS[:, ::-1], np.where(LEFT, 3, 0).astype(np.uint8)])


@pytest.mark.parametrize(
    "values", [BLACK_BRUSH, SOFT_BRUSH, np.dstack([COLOURS, OPAQUE])], ids=["black", "soft", "b/w"]
)
def test_a_brush_layer_counts_where_it_was_painted(values):
    """Whatever its colour; a picture that is opaque everywhere has only its colours."""
    for mask in (Image.fromarray(values), values, torch.from_numpy(values), values / 255, values[None]):
        assert np.array_equal(masks.read(mask)[0], LEFT > 0)
    grey = Image.fromarray(np.ascontiguousarray(values[..., 2:]), "LA")
    for mask in (grey, np.array(grey)):
        assert np.array_equal(masks.read(mask)[0], LEFT > 0)


def test_an_unpainted_layer_is_an_empty_mask():
    with pytest.raises(ValueError, match="edit_mask: expected some nonzero pixels, got an empty mask"):
        masks.read(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))


HIDDEN = np.ma.masked_array(np.where(LEFT, 1.0, np.nan), mask=LEFT == 0)


@pytest.mark.parametrize(
    "mask",
    [
        torch.from_numpy(COLOURS), torch.from_numpy(COLOURS).bool(), torch.from_numpy(COLOURS)[None], COLOURS[None],
        torch.from_numpy(LEFT)[None, :, :, None], LEFT[None, ..., None], torch.from_numpy(LEFT)[None, None],
        torch.from_numpy(LEFT > 0).to(torch.float8_e4m3fn), torch.from_numpy(LEFT > 0).to(torch.bfloat16),
        torch.from_numpy(LEFT > 0).float().requires_grad_(), LEFT.astype(np.uint16), LEFT.astype(np.uint64),
        (LEFT > 0).astype(np.longdouble), (LEFT > 0).astype(np.float16), -0.0 + LEFT.astype(">f8"), HIDDEN,
        LEFT[:, ::-1][:, ::-1], torch.from_numpy(LEFT.astype(np.int32)).to(torch.uint16),
    ],
    ids=lambda mask: f"{type(mask).__name__}-{mask.dtype}-{tuple(mask.shape)}",
)  # fmt: skip
def test_arrays_and_tensors_mean_the_same(mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = masks.read(mask, batch=2)
    assert torch.equal(found, torch.from_numpy(LEFT > 0))


def test_a_batch_of_colour_masks():
    both = np.stack([COLOURS, COLOURS[:, ::-1]])
    for mask in (both, torch.from_numpy(both), list(both), [Image.fromarray(one) for one in both]):
        found = masks.read(mask, batch=2)
        assert [one.tolist() for one in found] == [(LEFT > 0).tolist(), (LEFT > 0)[:, ::-1].tolist()]
    found = masks.read(torch.from_numpy(both[..., 1:2]), batch=2)
    assert [one.tolist() for one in found] == [(LEFT > 0).tolist(), (LEFT > 0)[:, ::-1].tolist()]


def test_the_batch_decides_what_the_first_of_three_axes_is():
    values = np.ones((6, 8, 3))
    assert [tuple(one.shape) for one in masks.read(values, batch=1)] == [(6, 8)]
    assert [tuple(one.shape) for one in masks.read(values, batch=6)] == [(8, 3)] * 6
    assert [tuple(one.shape) for one in masks.read([values], batch=6)] == [(6, 8)]  # a list holds one mask each
    assert len(masks.read(np.ones((3, 8, 8)), batch=3)) == 3


NEGATIVE = r"edit_mask: expected zero where .* got values from -8 to 8; of logits pass mask > 0"


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.where(LEFT, 8.0, -8.0), ValueError, NEGATIVE),
        (np.where(LEFT, 8, -8), ValueError, NEGATIVE),
        (torch.from_numpy(np.where(LEFT, 8.0, -8.0)).half(), ValueError, NEGATIVE),
        (Image.fromarray(np.where(LEFT, 8, -8).astype(np.int32)), ValueError, NEGATIVE),
        ([LEFT, np.where(LEFT, 1.0, -1.0)], ValueError, "edit_mask: .* from -1 to 1"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), ValueError, "expected finite values, got NaN"),
        (torch.full((8, 8), -torch.inf), ValueError, "expected finite values"),
        (torch.ones(8, 8, dtype=torch.complex64), TypeError, "numbers or booleans, got torch.complex64"),
        (np.ones((8, 8), complex), TypeError, "numbers or booleans, got dtype complex128"),
        (np.array([["a"]], dtype=object), TypeError, "numbers or booleans, got dtype object"),
        (np.zeros((8, 8), "M8[s]"), TypeError, "numbers or booleans, got dtype datetime64"),
        (np.zeros((8, 8), [("a", "f4")]), TypeError, "numbers or booleans, got dtype"),
        (torch.ones(8, 8).to_sparse(), TypeError, "expected a dense tensor, got a tensor that is torch.sparse_coo"),
        (torch.ones(8, 8, device="meta"), ValueError, "expected a tensor with values, got one on the meta device"),
        (torch.ones(0, 8), ValueError, r"expected \(H, W\).*got \(0, 8\)"),
        (torch.ones(2, 8, 0), ValueError, r"expected \(H, W\).*got \(2, 8, 0\)"),
        (Image.new("L", (0, 5)), ValueError, r"expected \(H, W\).*got \(5, 0\)"),
        (Image.new("RGB", (0, 5)), ValueError, r"expected \(H, W\).*got \(5, 0, 3\)"),
        (np.ones((2, 2, 8, 8)), ValueError, r"expected \(H, W\).*got \(2, 2, 8, 8\)"),
        (np.float32(1), TypeError, "expected a PIL image, array or tensor, got float32"),
        (np.array(1.0), ValueError, r"expected \(H, W\).*got \(\)"),
        ([[0, 1], [1, 0]], TypeError, "expected a PIL image, array or tensor, got list"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_mask_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        masks.read(mask, batch=2)


RAMP = np.linspace(-4, 4, 256).reshape(16, 16)
SIGMOID = 1 / (1 + np.exp(-RAMP))


@pytest.mark.parametrize(
    "mask",
    [
        SIGMOID, torch.from_numpy(SIGMOID).half(), Image.fromarray(SIGMOID.astype(np.float32)),
        SIGMOID[None, ..., None], [SIGMOID, SIGMOID], np.stack([SIGMOID] * 2), np.dstack([SIGMOID] * 3),
    ],
)  # fmt: skip
def test_a_float_mask_without_a_zero_gets_one_warning_with_its_range(mask):
    with pytest.warns(UserWarning) as caught:
        found = masks.read(mask, batch=2)
    assert all(one.all() for one in found)
    (warning,) = caught
    assert "no value is zero, so every pixel is edited; values go from 0.0179" in str(warning.message)
    assert "to 0.98" in str(warning.message)


@pytest.mark.parametrize(
    "mask",
    [np.ones((8, 8)), torch.full((8, 8), 0.3), np.full((8, 8, 3), 0.5), LEFT | 1, LEFT >= 0, Image.new("L", (8, 8), 9)],
)
def test_editing_everything_on_purpose_is_silent(mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert masks.read(mask)[0].all()


QUICK = dict(steps=(1, 1, 1), draft_steps=1)


def test_a_wrong_mask_is_refused_before_any_work(pipe, edit, count_calls):
    calls = count_calls(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    specedit.install(pipe, **QUICK)
    for mask, message in (
        (np.where(LEFT, 1.0, -1.0), "got values from -1 to 1"),
        (torch.ones(3, 16, 16), "expected 1 mask, got 3; the channels of a colour mask are its last axis"),
        ([LEFT, LEFT], "expected 1 mask, got 2"),
    ):
        with pytest.raises(ValueError, match=f"edit_mask: .*{message}"):
            edit(pipe, edit_mask=mask)
    with pytest.raises(ValueError, match="edit_mask: expected 1 mask or 2, one for each image, got 3"):
        edit(pipe, edit_mask=[LEFT] * 3, num_images_per_prompt=2)
    assert not calls
    edit(pipe, edit_mask=LEFT)
    assert calls


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "PA", "RGBA"])
def test_keep_pixels_protects_what_any_picture_keeps(pipe, edit, picture, mode):
    specedit.install(pipe, **QUICK, keep_pixels=True, restore="reference")
    given = Image.fromarray(BLACK_BRUSH) if mode == "RGBA" else drawn(mode)
    out = np.asarray(edit(pipe, edit_mask=given, output_type="pil")[0])
    before = np.asarray(picture(128, 128))
    assert np.array_equal(out[:, 64:], before[:, 64:]) and not np.array_equal(out[:, :64], before[:, :64])
    assert specedit.report(pipe).edit_fraction == 0.5


def test_a_call_warns_of_a_soft_mask_once(pipe, edit):
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="no value is zero") as caught:
        edit(pipe, edit_mask=torch.from_numpy(SIGMOID))
    assert len([w for w in caught if "no value is zero" in str(w.message)]) == 1

"""What people upload and paint."""

import numpy as np
import pytest
from PIL import Image

from specedit.app import uploads
from specedit.app.uploads import Limits


def saved(tmp_path, image, name="in.png"):
    image.save(tmp_path / name)
    return tmp_path / name


def test_a_picture_within_the_limits_is_read(tmp_path, picture):
    path = saved(tmp_path, picture(64, 96))
    limits = Limits(path.stat().st_size, 64 * 96)
    assert np.array_equal(uploads.read(path, limits).image, picture(64, 96))


@pytest.mark.parametrize(
    ("size", "limits", "says"),
    [
        ((96, 64), Limits(bytes=1000), "in.png: expected a file of at most 0.001 MB, got 0.0"),
        ((2000, 1000), Limits(pixels=10**6), "in.png: expected at most 1 megapixels, got 2.0 (2000 x 1000)"),
        ((96, 48), Limits(), "in.png: expected at least 64 px a side, got 96 x 48"),
    ],
)
def test_larger_and_smaller_pictures_are_refused_without_being_decoded(
    tmp_path, picture, monkeypatch, size, limits, says
):
    width, height = size
    path = saved(tmp_path, picture(height, width))
    monkeypatch.setattr(uploads.pictures, "read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError) as error:
        uploads.read(path, limits)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\nno"])
def test_what_is_no_picture_is_refused_by_its_name_alone(tmp_path, content):
    (tmp_path / "in.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^in.png: expected a picture that can be read"):
        uploads.read(tmp_path / "in.png", Limits())


@pytest.mark.parametrize("limits", [{"bytes": 0}, {"pixels": 1.5}, {"bytes": True}])
def test_wrong_limits_are_refused(limits):
    with pytest.raises((TypeError, ValueError), match="expected an integer of at least 1, got"):
        Limits(**limits)


def test_paint_of_all_layers_is_the_mask_at_the_pictures_size():
    layers = [Image.new("RGBA", (64, 32), (0, 0, 0, 0)) for _ in range(2)]
    layers[0].paste((200, 0, 0, 40), (0, 0, 16, 8))  # a soft edge counts
    layers[1].paste((0, 0, 0, 255), (48, 24, 64, 32))  # and so does black
    mask = np.asarray(uploads.painted({"background": None, "layers": layers, "composite": None}, (128, 64)))
    expected = np.zeros((64, 128), np.uint8)
    expected[:16, :32] = expected[48:, 96:] = 255
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("drawing", [None, {"layers": []}, {"layers": [Image.new("RGBA", (8, 8))]}])
def test_no_paint_is_no_mask(drawing):
    assert uploads.painted(drawing, (16, 16)) is None


@pytest.mark.parametrize("drawing", [3, {"layers": None}, {"layers": ["x.png"]}])
def test_what_no_painter_gives_is_refused(drawing):
    with pytest.raises(TypeError, match="mask: expected the painter's layers as PIL pictures, got"):
        uploads.painted(drawing, (16, 16))


def test_a_large_picture_is_painted_on_smaller(picture):
    assert uploads.to_paint_on(picture(500, 2000)).size == (1024, 256)
    small = picture(64, 96)
    assert uploads.to_paint_on(small) is small and uploads.to_paint_on(None) is None

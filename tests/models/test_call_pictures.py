"""What a call takes for a picture: the stock pipeline's own meaning, or an error that says what to do."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import specedit

FULL = dict(steps=(0, 0, 2), draft_steps=1)  # SpecEdit's loop, computing what the stock pipeline does
QUICK = dict(steps=(1, 1, 1), draft_steps=1)


def forms(picture):
    """The same picture in the forms that FluxKontextPipeline takes."""
    array = (np.asarray(picture) / 255).astype(np.float32)[None]
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    return {
        "picture": picture,
        "list": [picture],
        "array": array,
        "array of doubles": array.astype(float),
        "list of arrays": [array],
        "signed array": array * 2 - 1,
        "tensor": tensor,
        "half tensor": tensor.half(),
        "bfloat16 tensor": tensor.bfloat16(),
        "signed tensor": tensor * 2 - 1,
        "list of tensors": [tensor],
        "latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    }


def both(pipe, run, **settings):
    """What `run` gives with the stock pipeline and with SpecEdit installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stock's, of values below 0 and lists of batches
        stock = run(num_inference_steps=2)
        specedit.install(pipe, **settings)
        return stock, run()


@pytest.fixture(scope="module")
def kontext(make_pipe):
    return make_pipe()


@pytest.fixture
def stock_kontext(kontext):
    yield kontext
    specedit.uninstall(kontext)


@pytest.mark.parametrize("form", forms(Image.new("RGB", (8, 8))))
def test_kontext_takes_every_form_as_stock_does(stock_kontext, edit, picture, form):
    image = forms(picture())[form]
    stock, ours = both(stock_kontext, lambda **more: edit(stock_kontext, image=image, **more), **FULL)
    assert torch.equal(stock, ours)


def test_a_single_array_or_tensor_needs_no_batch_axis(stock_kontext, edit, picture):
    """Stock takes neither."""
    specedit.install(stock_kontext, **FULL)
    given = forms(picture())
    for form in ("array", "tensor"):
        assert torch.equal(edit(stock_kontext, image=given[form][0]), edit(stock_kontext, image=given[form]))


REFUSED = [
    (Image.new("L", (128, 128)), r'an RGB picture, got mode \'L\'; use image.convert\("RGB"\)'),
    (Image.new("P", (128, 128)), r'got mode \'P\'; use image.convert\("RGB"\)'),
    (Image.new("CMYK", (128, 128)), r'got mode \'CMYK\'; use image.convert\("RGB"\)'),
    (Image.new("HSV", (128, 128)), r'got mode \'HSV\'; use image.convert\("RGB"\)'),  # which stock takes for RGB
    (Image.new("YCbCr", (128, 128)), r'got mode \'YCbCr\'; use image.convert\("RGB"\)'),
    (Image.new("LAB", (128, 128)), r"got mode 'LAB'; use ImageCms.profileToProfile"),
    (Image.new("RGBA", (128, 128)), r"got mode 'RGBA'; composite it on a background"),
    (Image.new("LA", (128, 128)), r"got mode 'LA'; composite it on a background"),
    (Image.new("I;16", (128, 128)), r"got mode 'I;16'; scale it to 8 bits"),
    (Image.new("F", (128, 128)), r"got mode 'F'; scale it to 8 bits"),
]
ARRAYS = [
    (np.zeros((1, 128, 128, 3), np.uint8), r"floating point values in 0..1, got uint8; as floats, divide them by 255"),
    (torch.zeros(1, 3, 128, 128, dtype=torch.uint8), r"got torch.uint8; as floats, divide them by 255"),  # stock: white
    (np.full((1, 128, 128, 3), 255.0), r"floating point values in 0..1, got values from 255 to 255"),
    (torch.zeros(1, 3, 128, 128, dtype=torch.float8_e4m3fn), r"floating point values in 0..1, got torch.float8_e4m3fn"),
    (torch.zeros(3, 128, 128).to_sparse(), r"a dense tensor with values, got a tensor of layout torch.sparse_coo"),
    (torch.zeros(3, 128, 128, device="meta"), r"a dense tensor with values, got a meta tensor"),
    (np.zeros((128, 128)), r"\(H, W, 3\), with or without a batch in front, got \(128, 128\)"),
    (np.zeros((1, 128, 128, 1)), r"\(H, W, 3\), with or without a batch in front, got \(1, 128, 128, 1\)"),
    (np.zeros((1, 128, 128, 4)), r"\(H, W, 3\), with or without a batch in front, got \(1, 128, 128, 4\)"),
    (torch.zeros(4, 128, 128), r"\(3, H, W\), with or without a batch in front, got \(4, 128, 128\)"),
    ((Image.new("RGB", (128, 128)),), r"a PIL image, array or tensor, got tuple"),
]


@pytest.mark.parametrize(("image", "says"), REFUSED + ARRAYS)
@pytest.mark.parametrize("many", [False, True])
def test_what_kontext_gets_wrong_is_refused(stock_kontext, edit, image, says, many):
    specedit.install(stock_kontext, **QUICK)
    with pytest.raises((ValueError, TypeError), match=f"image: expected .*{says}") as error:
        edit(stock_kontext, image=[image] if many else image)
    assert "\n" not in str(error.value)


def qwen_call(pipe, image, **more):
    generator = torch.Generator().manual_seed(0)
    defaults = dict(height=128, width=128, output_type="latent", generator=generator)
    return pipe(image=image, prompt="red", **defaults | more).images


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_qwen_takes_pictures_and_nothing_else(make_qwen, picture, name):
    import diffusers

    pipe = make_qwen(getattr(diffusers, name))
    for image in (picture(), [picture()]):
        stock, ours = both(pipe, lambda image=image, **more: qwen_call(pipe, image, **more), **FULL)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)  # its positions are computed another way
        specedit.uninstall(pipe)
    specedit.install(pipe, **QUICK)
    for image, says in REFUSED:
        with pytest.raises(ValueError, match=f"image: expected .*{says}"):
            qwen_call(pipe, image)
    for image, _ in ARRAYS:  # of which stock takes none
        kind = type(image).__name__
        with pytest.raises(TypeError, match=re.escape(f"image: expected a PIL image or a list of them, got {kind}")):
            qwen_call(pipe, image)


# ---------------------------------------------------------------------------------------------------- small pictures


def check_stock(pipe, run, count=2):
    """`count` calls run stock, with one warning together."""
    stock = run(num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    with pytest.warns(
        UserWarning, match=r"runs the stock pipeline: a picture with fewer than 4 tokens a side, 64 px"
    ) as w:
        for _ in range(count):
            assert torch.equal(run(num_inference_steps=2), stock)
    assert sum("SpecEdit" in str(each.message) for each in w) == 1
    with pytest.raises(ValueError, match="the last one ran the stock pipeline: a picture with fewer than 4 tokens"):
        specedit.report(pipe)


@pytest.mark.parametrize(
    ("picture_px", "output_px"),
    [((48, 128), (48, 128)), ((128, 128), (128, 48)), ((32, 32), (128, 128)), ((16, 16), (16, 16))],
)
def test_an_output_or_reference_under_4_tokens_runs_stock(stock_kontext, edit, picture, picture_px, output_px):
    image = picture(*picture_px)
    check_stock(stock_kontext, lambda **more: edit(stock_kontext, size=output_px, image=image, **more))


def test_4_tokens_are_enough(stock_kontext, edit):
    specedit.install(stock_kontext, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        edit(stock_kontext, size=(64, 64))
        assert specedit.report(stock_kontext).nfe == 3
        edit(stock_kontext, size=(64, 64), image=torch.zeros(1, 4, 8, 8))


def test_pictures_that_the_pipeline_enlarges_may_be_tiny(stock_kontext, edit, make_qwen, picture, monkeypatch):
    from specedit.models import flux

    monkeypatch.setattr(flux, "PREFERRED_KONTEXT_RESOLUTIONS", [(128, 128)])
    specedit.install(stock_kontext, **QUICK)
    edit(stock_kontext, size=(128, 128), image=picture(20, 20), _auto_resize=True)
    assert specedit.report(stock_kontext).nfe == 3
    pipe = specedit.install(make_qwen(), **QUICK)
    for size in ((1, 1), (5, 7), (30, 40)):
        qwen_call(pipe, picture(*size), height=None, width=None)
        assert specedit.report(pipe).nfe == 3


def test_qwen_and_longcat_under_4_tokens(make_qwen, make_longcat, picture):
    pipe = make_qwen()
    check_stock(pipe, lambda **more: qwen_call(pipe, picture(), **{"height": 48} | more))
    pipe = make_longcat()
    thin = picture(20, 200)

    def run(**more):
        generator = torch.Generator().manual_seed(0)
        return pipe(image=thin, prompt="red", output_type="latent", generator=generator, **more).images

    check_stock(pipe, run, count=1)


def test_a_picture_of_less_than_a_token_is_an_error(stock_kontext, edit, picture):
    """Stock divides by zero."""
    specedit.install(stock_kontext, **QUICK)
    for resize in (True, False):
        with pytest.raises(ValueError, match="image: expected at least 16 px a side, got 40 x 15"):
            edit(stock_kontext, image=picture(15, 40), _auto_resize=resize)

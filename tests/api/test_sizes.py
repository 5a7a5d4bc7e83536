"""`specedit.size_for`: sizes at which the output's grid is the picture's."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image

import specedit
from specedit import pipelines
from specedit.micro.pipelines import OwnSizeQwenImageEditPipeline
from specedit.models import flux
from specedit.models.flux import FluxKontext
from specedit.models.longcat import LongCatImageEdit
from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from specedit.models.shared.shapes import is_embedded_kontext
from specedit.testing import Family
from training.micro import build

SHAPES = [(1008, 756), (480, 270), (300, 599), (320, 320)]
QUICK = dict(steps=(1, 1, 1), draft_steps=1)
# The released resolutions at about an eighth of a side.
SMALL = [tuple(max(64, round(side / 128) * 16) for side in size) for size in PREFERRED_KONTEXT_RESOLUTIONS]


def random_shapes(count=200):
    """Widths and heights from 1:2 to 2:1."""
    draw = np.random.default_rng(0)
    for ratio, height in zip(2 ** draw.uniform(-1, 1, count), draw.integers(128, 3000, count), strict=True):
        yield max(64, round(height * ratio)), int(height)


@pytest.fixture
def kontext(make_pipe, monkeypatch):
    """FLUX.1-Kontext's rules at an eighth of a side."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    for module in (flux, pipeline_flux_kontext):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", SMALL)
    return Family(FluxKontext, make_pipe, lambda height, width: dict(prompt="make it red", max_sequence_length=8))


@pytest.fixture
def qwens(make_qwen):
    def make(adapter, *cls):
        return Family(adapter, lambda: make_qwen(*cls), lambda height, width: dict(prompt="make it red"))

    return make(QwenImageEdit), make(QwenImageEditPlus, QwenImageEditPlusPipeline)


@pytest.mark.parametrize("size", PREFERRED_KONTEXT_RESOLUTIONS)
def test_the_area_gives_every_preferred_resolution_exactly(pipe, size):
    given = specedit.size_for(pipe, Image.new("RGB", size))
    assert (given["width"], given["height"]) == size and given["max_area"] == size[0] * size[1]
    stock = pipe(prompt="a", num_inference_steps=1, output_type="latent", max_sequence_length=8, **given).images
    assert stock.shape[1] == size[0] * size[1] // 256


def test_any_shape_gets_the_resolution_that_kontext_prefers(pipe):
    for width, height in random_shapes():
        given = specedit.size_for(pipe, torch.zeros(1).expand(3, height, width))
        size = FluxKontext._output_size(pipe, given, 16)
        assert size == flux.preferred_size(height // 16 * 16, width // 16 * 16, 16) == (given["height"], given["width"])
        frame = (width // 16) / (height // 16)
        assert (size[1], size[0]) == min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda s: (abs(frame - s[0] / s[1]), *s))


@pytest.mark.slow
def test_both_grids_agree_and_no_warning_comes(kontext, qwens):
    for family in (kontext, *qwens):
        pipe = specedit.install(family.make(), **QUICK)
        for size in SHAPES[1:2]:
            image = Image.new("RGB", size, "red")
            given = specedit.size_for(pipe, image)
            _, state = family.prepare(family.make(), image=image, **given)
            assert state.placement.is_same and state.uncovered_cells is None
            assert (16 * state.grid.height, 16 * state.grid.width) == (given["height"], given["width"])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                family.run(pipe, image=image, **given)


@pytest.mark.slow
def test_qwens_size_is_what_stock_computes_by_itself(qwens):
    for family in qwens:
        pipe = family.make()
        for size in SHAPES:
            image = Image.new("RGB", size)
            given = specedit.size_for(pipe, image)
            _, state = family.prepare(pipe, image=image)
            assert (16 * state.grid.height, 16 * state.grid.width) == (given["height"], given["width"])


@pytest.mark.slow
def test_a_plus_picture_of_another_area_than_the_output_gets_its_own(qwens, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 96 * 96)
    family, image = qwens[1], Image.new("RGB", (300, 300))
    assert specedit.size_for(family.make(), image) == dict(height=96, width=96)
    assert family.prepare(family.make(), image=image, height=96, width=96)[1].placement.is_same


def test_of_several_pictures_plus_edits_the_last_and_others_take_the_first(pipe, qwens):
    wide, tall = (Image.new("RGB", size) for size in ((200, 100), (100, 200)))
    edit, plus = (family.make() for family in qwens)
    assert specedit.size_for(plus, [wide, tall]) == specedit.size_for(plus, tall)
    for other in (edit, pipe):
        assert specedit.size_for(other, [wide, tall]) == specedit.size_for(other, wide)


def test_a_picture_of_any_kind(pipe, qwens):
    image = Image.new("L", (300, 200))
    array = np.zeros((200, 300, 3), dtype=np.float32)
    tensor = torch.zeros(3, 200, 300)
    for each in (pipe, qwens[0].make()):
        expected = specedit.size_for(each, image)
        for picture in (array, array[None], tensor, tensor[None], [array], (tensor, tensor)):
            assert specedit.size_for(each, picture) == expected
        assert specedit.size_for(specedit.install(each), image) == expected


def test_latents_keep_their_size(pipe):
    given = specedit.size_for(pipe, torch.zeros(1, 4, 13, 20))
    assert given == dict(height=96, width=160, max_area=96 * 160)


@pytest.mark.skipif(LongCatImageEdit is None, reason="this diffusers has no LongCatImageEditPipeline")
def test_a_pipeline_without_size_arguments_needs_none(make_longcat):
    assert specedit.size_for(make_longcat(), Image.new("RGB", (300, 200))) == {}


def test_embedded_editors_work_at_the_pictures_own_size(pipe, make_qwen):
    image = Image.new("RGB", (279, 256))
    pipe.transformer = build.transformer()
    assert is_embedded_kontext(pipe)
    expected = dict(height=256, width=272, max_area=256 * 272, _auto_resize=False)
    assert specedit.size_for(pipe, image) == expected
    assert specedit.size_for(make_qwen(OwnSizeQwenImageEditPipeline), image) == dict(height=256, width=272)


def test_fewer_layers_do_not_make_an_embedded_editor(pipe):
    """Pruned versions of the released model have few layers too."""
    assert len(pipe.transformer.transformer_blocks) < 19 and not is_embedded_kontext(pipe)
    assert not is_embedded_kontext(SimpleNamespace(transformer=None))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(96, 64), (640, 480)])
def test_the_command_line_does_not_zoom_into_small_pictures(qwens, monkeypatch, size):
    for family in qwens:
        pipe = family.make()
        monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda model, pipe=pipe, **_: pipe)
        image, given = pipelines.load("some/editor")[1](Image.new("RGB", size, "red"))
        assert family.prepare(pipe, image=image, **given)[1].placement.is_same


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("photo.png", TypeError, "picture: expected a PIL image, array or tensor, got str"),
        ([None], TypeError, "picture: expected a PIL image, array or tensor, got NoneType"),
        ([], ValueError, "picture: expected at least one picture, got an empty list"),
        (np.zeros((8, 8)), ValueError, r"picture: expected \(H, W, C\), .*got \(8, 8\)"),
        (torch.zeros(7), ValueError, r"picture: expected \(C, H, W\), .*got \(7,\)"),
        (torch.zeros(3, 0, 8), ValueError, r"picture: expected \(C, H, W\), .*got \(3, 0, 8\)"),
        (Image.new("RGB", (15, 300)), ValueError, "picture: expected at least 16 px a side, got 15 x 300"),
    ],
)
def test_what_is_no_picture(pipe, picture, error, message):
    with pytest.raises(error, match=message):
        specedit.size_for(pipe, picture)


def test_a_pipeline_that_is_not_supported():
    with pytest.raises(TypeError, match=r"size_for: expected one of FluxKontextPipeline, .*got object"):
        specedit.size_for(object(), Image.new("RGB", (300, 200)))

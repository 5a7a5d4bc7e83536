"""Pipelines by name, and the pictures that they get."""

import pytest
import torch
from PIL import Image

import specedit
from specedit import pipelines
from specedit.micro import scenes


@pytest.mark.parametrize(("side", "got"), [(4000, (512, 512)), (500, (496, 496)), (130, (128, 128)), (64, (64, 64))])
def test_pictures_of_any_size_fit_the_editor(side, got):
    assert pipelines.fit(Image.new("RGB", (side, side)), 512).size == got
    assert pipelines.fit(Image.new("RGB", (1000, 300)), 512).size == (512, 144)
    assert pipelines.fit(Image.new("RGB", (60, 3)), 512).size == (48, 16)
    assert pipelines.fit(Image.new("RGB", (4000, 9)), 512).size == (512, 16)


def test_one_pipeline_prepares_pictures_of_any_size():
    pipe, prepare = pipelines.load("kontext")
    assert type(pipe).__name__ == "FluxKontextPipeline"
    for size, got in (((96, 64), (96, 64)), ((1030, 1030), (512, 512))):
        image, given = prepare(Image.new("RGB", size))
        assert image.size == got == (given["width"], given["height"])


class Editor:
    def to(self, device):
        return self

    def __call__(self, image, prompt, height=None, width=None):
        raise NotImplementedError


class Kontext(Editor):
    class transformer:
        class config:
            num_layers = 19

    def __call__(self, image, prompt, height=None, width=None, max_area=1024**2):
        raise NotImplementedError


@pytest.mark.parametrize("size", [(96, 64), (1024, 1024), (1040, 1024)])
@pytest.mark.parametrize("own_size", [True, False])
@pytest.mark.parametrize("kind", [Editor, Kontext])
def test_who_chooses_the_size(monkeypatch, kind, own_size, size):
    """Of Kontext the picture's sets the aspect ratio alone; other pipelines take it as it is, up to a megapixel."""
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda model, **_: kind())
    _, prepare = pipelines.load("some/editor", own_size)
    picture = Image.new("RGB", size)
    named = kind is Kontext or (own_size and size != (1040, 1024))
    assert prepare(picture) == (picture, {"height": size[1], "width": size[0]} if named else {})


def test_offloading_changes_nothing():
    """Each part comes to the device when it runs, and the edit is the same."""
    task, images = scenes.sample(4, 64), []
    for offload in (False, True):
        pipe, prepare = pipelines.load("kontext", offload=offload)
        assert hasattr(pipe.transformer, "_hf_hook") == offload
        picture, given = prepare(task.source)
        pipe.set_progress_bar_config(disable=True)
        specedit.install(pipe, steps=(1, 1, 1), draft_steps=1)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(image=picture, prompt=task.prompt, generator=generator, output_type="pt", **given).images)
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)

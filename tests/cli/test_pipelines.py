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


@pytest.mark.parametrize("size", [(96, 64), (1024, 1024), (4032, 3024)])
def test_pipeline_gets_the_size_without_cropping(monkeypatch, make_pipe, size):
    pipe, picture = make_pipe(), Image.new("RGB", size)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda model, **_: pipe)
    got, given = pipelines.load("some/editor")[1](picture)
    assert got is picture and given == specedit.size_for(pipe, picture)


def test_unsupported_pipeline_chooses_its_own_size(monkeypatch):
    class Other:
        transformer = None

        def to(self, device):
            return self

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda model, **_: Other())
    picture = Image.new("RGB", (96, 64))
    assert pipelines.load("some/editor")[1](picture) == (picture, {})


@pytest.mark.slow
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

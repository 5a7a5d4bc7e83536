"""What install refuses."""

import importlib

import diffusers
import pytest
import torch
from diffusers import FluxKontextPipeline

import specedit
from specedit.api.installing import is_active


@pytest.mark.parametrize("thing", [None, 3, "pipe", object(), torch.nn.Linear(1, 1), FluxKontextPipeline])
def test_another_kind_of_pipeline(thing):
    with pytest.raises(TypeError, match=r"install: expected one of FluxKontextPipeline, .*QwenImageEditPlus.*got"):
        specedit.install(thing)
    assert specedit.uninstall(thing) is thing


def test_a_wrong_configuration_leaves_the_pipeline_alone(pipe, check_untouched):
    check = check_untouched(pipe)
    for arguments, error in (
        (dict(config="trubo"), ValueError),
        (dict(threshold=9), ValueError),
        (dict(steps=(1, 2)), ValueError),
        (dict(steeps=(1, 2, 3)), TypeError),
        (dict(rope="phase_aligned", attention="stock"), ValueError),
        (dict(config=7), TypeError),
    ):
        with pytest.raises(error, match=r"expected|not a field"):
            specedit.install(pipe, **arguments)
        assert type(pipe) is FluxKontextPipeline
    specedit.install(pipe, "turbo")
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        specedit.install(pipe, "balancd")
    check()


def test_a_pipeline_without_its_transformer(pipe):
    transformer, pipe.transformer = pipe.transformer, None
    with pytest.raises(ValueError, match="expected a FluxKontextPipeline with a transformer, got one without"):
        specedit.install(pipe)
    assert type(pipe) is FluxKontextPipeline and not is_active(pipe)
    pipe.transformer = transformer
    assert is_active(specedit.install(pipe))


@pytest.mark.parametrize("version", ["0.35.2", "0.9.0", "0.35.0.dev0"])
def test_a_diffusers_that_is_too_old(pipe, monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"expected diffusers >= 0.36, got {version}"):
        specedit.install(pipe)
    assert type(pipe) is FluxKontextPipeline
    with pytest.raises(ImportError, match=f"expected diffusers >= 0.36, got {version}"):
        importlib.reload(specedit.models)  # and so does the first import


@pytest.mark.parametrize("version", ["0.36.0", "0.37.0.dev0", "1.0.0"])
def test_a_diffusers_that_is_new_enough(pipe, monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert is_active(specedit.install(pipe))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("FluxKontextModularPipeline", "expected FluxKontextPipeline"),
        ("QwenImageEditModularPipeline", "expected QwenImageEditPipeline"),
        ("QwenImageEditPlusModularPipeline", "expected QwenImageEditPlusPipeline"),
        ("FluxModularPipeline", "expected one of FluxKontextPipeline, .*QwenImageEditPipeline, .*EditPlusPipeline"),
        ("ModularPipeline", "expected one of FluxKontextPipeline, .*QwenImageEditPipeline, .*EditPlusPipeline"),
    ],
)
def test_modular_pipelines(name, instead):
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")

    class Mine(cls):
        pass

    for kind, called in ((cls, name), (Mine, "Mine")):
        pipe = kind.__new__(kind)  # making one needs its blocks, some of which need torchvision
        before = dict(vars(pipe))
        with pytest.raises(
            TypeError, match=f"install: modular pipelines cannot be accelerated.*{instead}.*got {called}$"
        ):
            specedit.install(pipe)
        assert specedit.uninstall(pipe) is pipe and type(pipe) is kind and vars(pipe) == before and not is_active(pipe)


def test_a_modular_pipeline_that_was_made():
    from diffusers import ModularPipeline, ModularPipelineBlocks

    class Blocks(ModularPipelineBlocks):
        pass

    with pytest.raises(
        TypeError, match=r"modular pipelines cannot be accelerated yet: expected one of .* got ModularPipe"
    ):
        specedit.install(ModularPipeline(Blocks()))

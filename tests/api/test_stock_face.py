"""To its host an installed pipeline is the stock pipeline: its signature, its errors, and what its class makes."""

import copy
import inspect
import json
import pickle
import typing

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, FluxKontextInpaintPipeline, FluxKontextPipeline

import specedit
from specedit.api.installing import is_active
from tests.api.common import CORNER, QUICK, processors

STOCK = inspect.signature(FluxKontextPipeline.__call__)


@pytest.mark.parametrize(
    "read", [lambda p: type(p).__call__, lambda p: p.__call__, lambda p: p], ids=["type", "bound", "pipe"]
)
def test_the_signature_is_stocks_and_edit_mask(pipe, read):
    stock = inspect.signature(read(pipe))
    signature = inspect.signature(read(specedit.install(pipe)))
    *parameters, mask = signature.parameters.values()
    assert parameters == list(stock.parameters.values())  # names, kinds, defaults and annotations
    assert (mask.name, mask.kind, mask.default) == ("edit_mask", inspect.Parameter.KEYWORD_ONLY, None)
    assert signature.return_annotation == stock.return_annotation
    assert specedit.uninstall(pipe) is pipe and inspect.signature(read(pipe)) == stock


def test_a_server_that_filters_by_argument_names_keeps_them_all(pipe):
    specedit.install(pipe)
    spec = inspect.getfullargspec(type(pipe).__call__)
    assert spec.args == list(STOCK.parameters) and spec.kwonlyargs == ["edit_mask"]
    assert spec.varargs is None and spec.varkw is None
    hints = typing.get_type_hints(type(pipe).__call__)
    stock = typing.get_type_hints(FluxKontextPipeline.__call__)
    assert hints.keys() - stock.keys() == {"edit_mask"} and stock.items() <= hints.items()
    assert inspect.signature(type(pipe)) == inspect.signature(FluxKontextPipeline)
    assert "edit_mask" not in STOCK.parameters and inspect.signature(FluxKontextPipeline.__call__) == STOCK


def test_the_docstring_is_stocks_and_a_paragraph(pipe):
    specedit.install(pipe)
    doc, stock = type(pipe).__call__.__doc__, FluxKontextPipeline.__call__.__doc__
    assert doc.startswith(stock.rstrip()) and "edit_mask" in doc and "edit_mask" not in stock
    assert pipe.__call__.__name__ == "__call__" and pipe.__call__.__qualname__ == "FluxKontextPipeline.__call__"


def test_each_class_has_a_separate_function(make_pipe):
    class Described(FluxKontextPipeline):
        def __call__(self, image, prompt, *, strength=0.5, **kwargs):
            """Mine."""

    first, second, other = (
        specedit.install(make_pipe(c)) for c in (FluxKontextPipeline, FluxKontextPipeline, Described)
    )
    assert len({type(p).__call__ for p in (first, second, other)}) == 3
    parameters = inspect.signature(other.__call__).parameters
    assert list(parameters) == ["image", "prompt", "strength", "edit_mask", "kwargs"]
    assert other.__call__.__doc__.startswith("Mine.")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {"imagee": 1}), ((None,), {"image": None}), ((None,) * 99, {}), ((), {"num_inference_steps ": 3})],
)
def test_errors_of_wrong_arguments_are_stocks(pipe, args, kwargs):
    with pytest.raises(TypeError) as stock:
        pipe(*args, **kwargs)
    specedit.install(pipe)
    with pytest.raises(TypeError) as ours:
        pipe(*args, edit_mask=CORNER, **kwargs)
    assert str(ours.value) == str(stock.value)


def reload(pipe, folder):
    pipe.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    return type(pipe).from_pretrained(folder)


WAYS = {
    "class": lambda pipe, folder: type(pipe)(**pipe.components),
    "from_pipe of the class": lambda pipe, folder: type(pipe).from_pipe(pipe),
    "from_pipe of the pipeline": lambda pipe, folder: pipe.from_pipe(pipe),
    "from_pipe of the stock class": lambda pipe, folder: FluxKontextPipeline.from_pipe(pipe),
    "auto": lambda pipe, folder: AutoPipelineForImage2Image.from_pipe(pipe),
    "from_pretrained": reload,
    "DiffusionPipeline": lambda pipe, folder: [reload(pipe, folder), DiffusionPipeline.from_pretrained(folder)][1],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_it_makes_is_a_stock_pipeline(pipe, edit, tmp_path, way):
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    made = WAYS[way](pipe, tmp_path)
    made.set_progress_bar_config(disable=True)
    assert type(made) is FluxKontextPipeline and not is_active(made) and "_specedit" not in vars(made)
    shared = made.transformer is pipe.transformer
    near = (lambda a, b: torch.equal(a, b)) if shared else (lambda a, b: torch.allclose(a, b, atol=1e-5))
    assert near(edit(made, num_inference_steps=2), stock)
    assert torch.equal(edit(pipe), expected)
    specedit.install(made, **QUICK)
    assert near(edit(made), expected) and specedit.report(made).nfe == 3
    specedit.uninstall(made)
    assert type(made) is FluxKontextPipeline and near(edit(made, num_inference_steps=2), stock)
    assert torch.equal(edit(pipe), expected)


def test_its_components_make_other_pipelines(pipe):
    specedit.install(pipe)
    assert type(FluxKontextInpaintPipeline(**pipe.components)) is FluxKontextInpaintPipeline
    with pytest.raises(ValueError) as ours:
        DiffusionPipeline.from_pipe(pipe)
    with pytest.raises(ValueError) as stock:
        DiffusionPipeline.from_pipe(specedit.uninstall(pipe))
    assert str(ours.value) == str(stock.value)


@pytest.mark.slow
def test_its_class_can_be_subclassed(pipe, edit):
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)

    class Mine(type(pipe)):
        pass

    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    assert type(mine) is Mine and torch.equal(edit(mine, num_inference_steps=2), stock)
    with pytest.raises(TypeError, match="edit_mask"):  # as the stock call says
        edit(mine, num_inference_steps=2, edit_mask=CORNER)
    specedit.install(mine, **QUICK)
    assert is_active(mine) and torch.equal(edit(mine), expected)
    assert type(specedit.uninstall(mine)) is Mine and torch.equal(edit(mine, num_inference_steps=2), stock)
    pipe.__class__ = Mine  # what a library does that swaps the class in its turn
    assert is_active(pipe) and torch.equal(edit(pipe), expected)
    specedit.uninstall(pipe)
    assert type(pipe) is Mine and not is_active(pipe) and torch.equal(edit(pipe, num_inference_steps=2), stock)


@pytest.mark.slow
def test_copies_are_counted_as_users(pipe, edit):
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    for duplicate in (copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))):
        again = duplicate(duplicate(pipe))
        assert is_active(again) and torch.equal(edit(again), expected)
        assert inspect.signature(again.__call__) == inspect.signature(pipe.__call__)
        assert type(type(again)(**again.components)) is FluxKontextPipeline
    other = copy.copy(pipe)
    specedit.uninstall(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), stock) and torch.equal(edit(other), expected)
    specedit.uninstall(other)
    assert not any(hasattr(p, "original") for p in processors(other))

"""The table of embedded editors."""

import inspect

import pytest
import torch

from specedit import micro
from specedit.micro import scenes
from specedit.micro.editors import editor_named, editor_of


def test_editor_of_a_pipeline(small_qwen, make_pipe):
    assert editor_of(small_qwen).name == "qwen" and editor_of(make_pipe()).name == "kontext"
    with pytest.raises(TypeError, match="expected a FluxKontextPipeline or QwenImageEditPipeline, got Linear"):
        editor_of(torch.nn.Linear(1, 1))


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match='expected "kontext" or "qwen", got \'sd\''):
        editor_named("sd")
    with pytest.raises(ValueError, match="got 'sd'"):
        micro.arguments(scenes.sample(0, 64).source, "sd")


def test_default_steps_are_the_pipelines_own():
    """Those of diffusers' signatures, so that scoring a stock call counts the steps that it ran."""
    for name in ("kontext", "qwen"):
        editor = editor_named(name)
        parameters = inspect.signature(inspect.unwrap(editor.pipeline.__call__)).parameters
        assert parameters["num_inference_steps"].default == editor.default_steps


def test_arguments_keep_the_pictures_size():
    picture = scenes.sample(0, (100, 130)).source
    assert micro.arguments(picture) == micro.arguments(picture, "kontext")
    for name in ("kontext", "qwen"):
        given = micro.arguments(picture, name)
        assert (given["height"], given["width"]) == (96, 128)
    assert micro.arguments(picture, "qwen")["negative_prompt"] == " "
    assert micro.arguments(picture, "qwen")["true_cfg_scale"] > 1  # or there would be no guidance


def test_the_student_is_packaged():
    assert (micro.STUDENT / "pytorch_lora_weights.safetensors").is_file()

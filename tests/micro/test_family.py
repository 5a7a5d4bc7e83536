"""The table of editors."""

import pytest
import torch

from specedit import micro
from specedit.micro import family, scenes


def test_every_entry_of_both_is_there():
    for name in ("kontext", "qwen"):
        one = family.named(name)
        assert one.name == name and all(getattr(one, field) is not None for field in family.Family.__annotations__)
    assert family.named("kontext").empty == 0  # its guidance is distilled: every prompt is seen
    assert 0 < family.named("qwen").empty < 0.5


def test_a_pipeline_has_one_family(small_qwen, make_pipe):
    assert family.of(small_qwen).name == "qwen" and family.of(make_pipe()).name == "kontext"
    with pytest.raises(TypeError, match="expected a FluxKontextPipeline or QwenImageEditPipeline, got Linear"):
        family.of(torch.nn.Linear(1, 1))


def test_unknown_names():
    with pytest.raises(ValueError, match='expected "kontext" or "qwen", got \'sd\''):
        family.named("sd")
    with pytest.raises(ValueError, match="got 'sd'"):
        micro.arguments(scenes.sample(0, 64).source, "sd")


def test_arguments_are_at_the_pictures_size():
    picture = scenes.sample(0, (100, 130)).source
    assert micro.arguments(picture) == micro.arguments(picture, "kontext")
    for name in ("kontext", "qwen"):
        given = micro.arguments(picture, name)
        assert (given["height"], given["width"]) == (96, 128)
    assert micro.arguments(picture, "qwen")["negative_prompt"] == " "
    assert micro.arguments(picture, "qwen")["true_cfg_scale"] > 1  # or there would be no guidance

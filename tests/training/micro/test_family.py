"""The table of trainable editors."""

import pytest
import torch

from training.micro.families import FAMILIES, family_named, family_of


def test_every_field_of_both_is_set():
    for name in ("kontext", "qwen"):
        family = family_named(name)
        assert family.editor.name == name and all(value is not None for value in vars(family).values())
    assert family_named("kontext").empty_prompts == 0  # its guidance is distilled, so no prompt is dropped
    assert 0 < family_named("qwen").empty_prompts < 0.5


def test_family_of_a_pipeline(small_qwen, make_pipe):
    assert family_of(small_qwen).editor.name == "qwen" and family_of(make_pipe()).editor.name == "kontext"
    with pytest.raises(TypeError, match="expected a FluxKontextPipeline or QwenImageEditPipeline, got Linear"):
        family_of(torch.nn.Linear(1, 1))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='expected "kontext" or "qwen", got \'sd\''):
        family_named("sd")


def test_every_editor_can_be_trained():
    from specedit.micro.editors import EDITORS

    assert set(FAMILIES) == {editor.name for editor in EDITORS}

"""What a call only needs to hear once."""

import pytest

import specedit
from specedit.models.qwen import edit as qwen
from specedit.models.shared import prompts


@pytest.mark.parametrize("call", [dict(true_cfg_scale=2.5), dict(negative_prompt="blue", true_cfg_scale=1.0)])
def test_missing_guidance_is_named_once(edit, monkeypatch, call):
    said = []
    monkeypatch.setattr(prompts.logger, "warning", said.append)
    pipe = specedit.install(edit.make())
    for _ in range(2):
        edit.prepare(pipe, **call)
    edit.prepare(pipe, **call | {"true_cfg_scale": call["true_cfg_scale"] - 0.25})
    assert len(said) == 1 and "there is no guidance" in said[0]
    edit.prepare(specedit.install(edit.make()), **call)
    assert len(said) == 2


def test_pictures_of_one_shape_are_named_once(plus, picture, monkeypatch):
    said = []
    monkeypatch.setattr(qwen.logger, "warning", said.append)
    pipe, images = specedit.install(plus.make()), [picture(128, 128, seed=3), picture(128, 128)]
    for _ in range(2):
        plus.prepare(pipe, image=images, true_cfg_scale=1.0)
    assert len(said) == 1 and "have one shape" in said[0]

"""Fixtures of the tests in this folder."""

import pytest
from diffusers import QwenImageEditPlusPipeline

from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from specedit.testing import Family


@pytest.fixture
def edit(make_qwen, picture):
    """QwenImageEditPipeline as a family."""

    def call(height, width):
        return dict(image=picture(height, width), prompt="make it red", height=height, width=width)

    return Family(QwenImageEdit, make_qwen, call)


@pytest.fixture
def plus(make_qwen, picture):
    """QwenImageEditPlusPipeline as a family, with two references of different shape; the second is the edited one."""

    def call(height, width):
        images = [picture(64, 128, seed=3), picture(height, width)]
        return dict(image=images, prompt="make it red", height=height, width=width)

    return Family(QwenImageEditPlus, lambda **options: make_qwen(QwenImageEditPlusPipeline, **options), call)

"""Fixtures of the tests in this folder."""

import pytest

from specedit.models.qwen21 import QwenImage21
from specedit.testing import Family


@pytest.fixture
def family_of(make_qwen21, picture):
    """Makes a family of pipelines with options of `make_qwen21`."""
    if QwenImage21 is None:
        pytest.skip("this diffusers has no QwenImage21Pipeline")

    def call(height, width):
        return dict(
            image=picture(height, width), prompt="make it red", height=height, width=width, output_resolution=128
        )

    return lambda **options: Family(QwenImage21, lambda: make_qwen21(**options), call)


@pytest.fixture
def family(family_of):
    return family_of()

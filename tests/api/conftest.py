"""Fixtures of the tests in this folder."""

import pytest
import torch

import specedit
from specedit.api.installing import is_active
from tests.api.common import processors, same_objects


@pytest.fixture
def check_untouched(edit):
    """Remembers a pipeline; the function that it returns asserts that uninstall brings everything back."""

    def remember(pipe):
        cls, parts, image, attributes = type(pipe), processors(pipe), edit(pipe, num_inference_steps=2), set(vars(pipe))

        def check():
            assert specedit.uninstall(pipe) is pipe
            assert type(pipe) is cls and not is_active(pipe)
            assert same_objects(processors(pipe), parts)
            assert torch.equal(edit(pipe, num_inference_steps=2), image)
            assert set(vars(pipe)) == attributes

        return check

    return remember

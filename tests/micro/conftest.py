"""An embedded Qwen editor that was never trained, small enough for tests, and steps of training of a few tasks."""

import copy

import pytest
import torch


@pytest.fixture(scope="session")
def qwen_parts():
    """Parts of `build_qwen.qwen` with a transformer of 5 blocks; what starts at zero is a little random instead."""
    from diffusers import QwenImageTransformer2DModel

    from specedit.micro import build_qwen

    pipe = build_qwen.qwen()
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "num_layers": 5}
    transformer = QwenImageTransformer2DModel.from_config(config).eval().requires_grad_(False)
    for parameter in transformer.parameters():  # as initialised its blocks hardly matter
        parameter.mul_(1.5)
    return {**pipe.components, "transformer": transformer}


@pytest.fixture
def make_small_qwen(qwen_parts):
    """Makes equal pipelines that share no module."""
    from specedit.micro.qwen_pipeline import OwnSizeQwenImageEditPipeline

    def make():
        pipe = OwnSizeQwenImageEditPipeline(**{name: copy.deepcopy(part) for name, part in qwen_parts.items()})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def small_qwen(make_small_qwen):
    return make_small_qwen()


@pytest.fixture
def few_tasks(monkeypatch):
    """A step of training at 64 px sees 8 tasks."""
    from specedit.micro import train_editor

    monkeypatch.setitem(train_editor.BATCHES, (64, 64), 8)

"""Shared by the tests of training."""

import pytest

from tests.small_training import shrink
from training.micro import build, build_qwen, loop


@pytest.fixture
def few_blocks(monkeypatch):
    """Transformers are built with few blocks: an early, a probed and a last one, and one that Qwen does not inherit."""
    monkeypatch.setattr(build, "BLOCKS", (2, 3))
    monkeypatch.setattr(build_qwen, "BLOCKS", 4)


@pytest.fixture
def few_tasks(monkeypatch, few_blocks):
    """Training steps have 2 tasks of 64 px, and editors few blocks."""
    shrink(monkeypatch, tasks=2)


@pytest.fixture
def at_full_rate(monkeypatch):
    """Few steps are enough: the learning rate does not rise to its value but begins with it."""
    monkeypatch.setattr(loop, "WARMUP", 1)

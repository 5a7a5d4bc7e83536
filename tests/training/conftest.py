"""Shared by the tests of training."""

import pytest

from tests.small_training import shrink


@pytest.fixture
def few_tasks(monkeypatch):
    """Training steps have 4 tasks of 64 px."""
    shrink(monkeypatch, tasks=4)

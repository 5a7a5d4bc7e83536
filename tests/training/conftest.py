"""Shared by the tests of training."""

import pytest


@pytest.fixture
def few_tasks(monkeypatch):
    """Training steps at 64 px have 8 tasks."""
    from training.micro import train_editor

    monkeypatch.setitem(train_editor.BATCHES, (64, 64), 8)

"""Fixtures of the tests in this folder."""

import pytest
import torch

from specedit.config import SpecEditConfig
from specedit.models.flux import FluxKontext
from tests.models.flux.common import CALL


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def prepare(pipe, picture):
    """Prepares a call: (adapter, pipe, state)."""

    def call(attention="auto", **changes):
        adapter = FluxKontext()
        adapter.attach(pipe)
        arguments = CALL | {"image": picture(), "generator": torch.Generator().manual_seed(0)} | changes
        return adapter, pipe, adapter.prepare(pipe, arguments, SpecEditConfig(attention=attention))

    return call

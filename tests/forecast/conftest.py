"""What the forecasters' tests share."""

import pytest
import torch


@pytest.fixture
def tokens():
    """A feature (1, 6, 4) whose numbers all differ."""
    return torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def observed():
    """Feeds function(step) at full steps to a forecaster."""

    def feed(forecaster, function, steps):
        for step in steps:
            forecaster.observe(step, function(step))
        return forecaster

    return feed

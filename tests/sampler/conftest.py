"""Fixtures of the tests in this folder."""

import numpy as np
import pytest
import torch


@pytest.fixture
def start(pipe, picture):
    """The call's noise and the reference's latents, (1, 4, 16, 16)."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return noise, pipe._encode_vae_image(pixels, None)

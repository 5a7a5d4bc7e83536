"""A toy pipeline, and its adapter while these tests run."""

import pytest
import torch
from diffusers import AutoencoderKL

import specedit
from specedit.models.registry import ADAPTERS
from tests.copies import Copies
from tests.extension.toy_adapter import ToyAdapter
from tests.extension.toy_pipeline import ToyPipeline, ToyTransformer


@pytest.fixture(scope="module", autouse=True)
def registered():
    specedit.register_adapter(ToyAdapter)
    yield
    ADAPTERS.unregister("toy")


@pytest.fixture(scope="module")
def make_toy():
    """Makes equal toy pipelines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ToyTransformer().eval()
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=1,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.5)
    transformers, vaes = Copies(transformer), Copies(vae)

    def make():
        pipe = ToyPipeline(transformers(), vaes())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def toy(make_toy):
    return make_toy()

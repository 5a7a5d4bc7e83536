"""Fixtures of the tests in this folder."""

import pytest

from specedit.models import flux2
from specedit.testing import Family
from tests.tiny_flux2 import LAYERS

FAMILIES = {
    "Flux2KleinPipeline": flux2.Flux2Klein, "Flux2Pipeline": flux2.Flux2Dev, "Flux2KleinKVPipeline": flux2.Flux2KleinKV,
}  # fmt: skip


@pytest.fixture
def family_of(make_flux2, picture):
    """Makes a family of a pipeline's class, by its name."""

    def make(name="Flux2KleinPipeline", **options):
        if FAMILIES[name] is None:
            pytest.skip(f"this diffusers has no {name}")

        def call(height, width):
            call = dict(
                image=picture(height, width), prompt="make it red", height=height, width=width, max_sequence_length=16,
                text_encoder_out_layers=LAYERS,
            )  # fmt: skip
            return call | (dict(guidance_scale=1.0) if name == "Flux2KleinPipeline" else {})

        return Family(FAMILIES[name], lambda: make_flux2(name, **options), call)

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request, family_of):
    """Each of the pipelines as a family."""
    return family_of(request.param)

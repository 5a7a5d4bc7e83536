"""FLUX.2's adapters against the conformance tests."""

import pytest
import torch

import specedit
from specedit.models.flux2 import Flux2Dev, Flux2Klein
from specedit.testing import QUICK, Conformance, Family
from tests.tiny_flux2 import LAYERS


def rotations(pipe, run):
    """(tokens, D) complex: what the transformer's last call in `run()` rotated its tokens by, without the axis that
    tells pictures apart. It asks for the image's table first, then for the text's."""
    seen, rope = [], pipe.transformer.pos_embed
    hook = rope.register_forward_hook(lambda module, args, out: seen.append(torch.complex(*(x.double() for x in out))))
    try:
        run()
    finally:
        hook.remove()
    table = torch.cat([seen[-1], seen[-2]])
    return table[:, table.shape[1] * rope.axes_dim[0] // sum(rope.axes_dim) :]


class Flux2Conformance(Conformance):
    """Prompts of one call have one length; every one of them is given all pictures."""

    pipeline, adapter, guided, more = "Flux2KleinPipeline", Flux2Klein, None, {}

    @pytest.fixture
    def family(self, make_flux2, picture):
        def call(height, width):
            return dict(
                image=picture(height, width), prompt="make it red", height=height, width=width,
                max_sequence_length=16, text_encoder_out_layers=LAYERS, **self.more,
            )  # fmt: skip

        return Family(
            self.adapter, lambda: make_flux2(self.pipeline), call, guided=self.guided,
            batch=lambda n: dict(prompt=["red", "make it large"][:n]), rotations=rotations, runs_others=True,
        )  # fmt: skip


@pytest.mark.skipif(Flux2Klein is None, reason="this diffusers has no Flux2KleinPipeline")
class TestFlux2Klein(Flux2Conformance):
    guided, more = dict(guidance_scale=2.5), dict(guidance_scale=1.0)


@pytest.mark.skipif(Flux2Dev is None, reason="this diffusers has no Flux2Pipeline")
class TestFlux2Dev(Flux2Conformance):
    """The guidance scale is an input of the transformer."""

    pipeline, adapter = "Flux2Pipeline", Flux2Dev

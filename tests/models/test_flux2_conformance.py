"""FLUX.2's adapters against the conformance tests."""

import pytest
import torch

from specedit.models.flux2 import Flux2Dev, Flux2Klein, Flux2KleinKV
from specedit.testing import Conformance, Family
from specedit.testing.conformance import CallConformance
from specedit.testing.modulation import ModulationConformance
from specedit.testing.stages import StageConformance
from specedit.testing.switches import SwitchConformance
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


class Flux2Family:
    """Prompts of one call have one length; every one of them is given all pictures."""

    pipeline, adapter, guided, more = "Flux2KleinPipeline", Flux2Klein, None, {}
    rotations, compiles_as = staticmethod(rotations), None

    @pytest.fixture
    def family(self, make_flux2, picture):
        def call(height, width):
            return dict(
                image=picture(height, width), prompt="make it red", height=height, width=width,
                max_sequence_length=16, text_encoder_out_layers=LAYERS, **self.more,
            )  # fmt: skip

        return Family(
            self.adapter, lambda: make_flux2(self.pipeline), call, guided=self.guided,
            batch=lambda n: dict(prompt=["red", "make it large"][:n]), rotations=self.rotations,
            runs_others=self.adapter.runs_others, compiles_as=self.compiles_as,
        )  # fmt: skip


@pytest.mark.skipif(Flux2Klein is None, reason="this diffusers has no Flux2KleinPipeline")
@pytest.mark.slow  # tests/models/flux2 has quick tests
class TestFlux2Klein(Flux2Family, Conformance):
    guided, more = dict(guidance_scale=2.5), dict(guidance_scale=1.0)

    # The tables of a rotation that is given are those of TestFlux2KleinKV.
    @pytest.mark.parametrize("changes", [{}, {"attention": "stock"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)


@pytest.mark.skipif(Flux2Dev is None, reason="this diffusers has no Flux2Pipeline")
@pytest.mark.thorough
class TestFlux2Dev(Flux2Family, CallConformance, ModulationConformance):
    """The guidance scale is an input of the transformer; but for it stages and switches are TestFlux2Klein's."""

    check_batch = StageConformance.check_batch
    test_samples_of_a_batch_are_independent = StageConformance.test_samples_of_a_batch_are_independent
    test_samples_are_independent_with_every_switch = StageConformance.test_samples_are_independent_with_every_switch
    test_leaves_are_called_in_the_stock_order = StageConformance.test_leaves_are_called_in_the_stock_order
    test_every_attention_setting_gives_the_same_edit = StageConformance.test_every_attention_setting_gives_the_same_edit
    test_forecasts_work_on_every_branch = StageConformance.test_forecasts_work_on_every_branch
    test_locked_cells_that_leave_the_target = SwitchConformance.test_locked_cells_that_leave_the_target
    test_reused_encodings_change_no_bit = SwitchConformance.test_reused_encodings_change_no_bit

    pipeline, adapter, compiles_as = "Flux2Pipeline", Flux2Dev, "Flux2Klein"


def rotations_behind_references(pipe, run):
    """`rotations` with the target's rows before the references', of a last call that computes the references."""
    counts, take = [], lambda module, args, kwargs: counts.append(kwargs["num_ref_tokens"])
    handle = pipe.transformer.register_forward_pre_hook(take, with_kwargs=True)
    table = rotations(pipe, run)
    handle.remove()
    text = 16
    references = slice(text, text + counts[-1])
    return torch.cat([table[:text], table[references.stop :], table[references]])


@pytest.mark.skipif(Flux2KleinKV is None, reason="this diffusers has no Flux2KleinKVPipeline")
@pytest.mark.thorough
class TestFlux2KleinKV(Flux2Family, Conformance):
    """The first step of every stage computes the references, and the others find their keys and values."""

    pipeline, adapter, rotations = "Flux2KleinKVPipeline", Flux2KleinKV, staticmethod(rotations_behind_references)

    # The other stages and stock attention are tried by TestFlux2Klein.
    @pytest.mark.parametrize("changes", [{"rope": "phase_aligned", "attention": "merged"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)

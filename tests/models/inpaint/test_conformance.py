"""Adapters of inpainting pipelines against the conformance tests."""

import numpy as np
import pytest
from PIL import Image

from specedit.models.flux2 import Flux2KleinInpaint
from specedit.models.flux_inpaint import FluxKontextInpaint
from specedit.models.qwen import QwenImageEditInpaint
from specedit.testing import Family
from specedit.testing.conformance import CallConformance
from specedit.testing.modulation import ModulationConformance
from specedit.testing.stages import StageConformance
from specedit.testing.switches import SwitchConformance

from ..test_flux2_conformance import rotations

pytestmark = pytest.mark.thorough  # the other files in this folder have quick tests
ODD = ((128, 128), (176, 80))  # Qwen's pipeline brings pictures to multiples of 32 px
FAMILIES = {
    "kontext": dict(adapter=FluxKontextInpaint, compiles_as="FluxKontext", runs_others=True, sizes=ODD),
    "qwen": dict(adapter=QwenImageEditInpaint, compiles_as="QwenImageEdit", sizes=((128, 128), (96, 192))),
    "klein": dict(
        adapter=Flux2KleinInpaint, compiles_as="Flux2Klein", runs_others=True, sizes=ODD, rotations=rotations
    ),
}


class InpaintFamily(Family):
    """Of calls that bring a mask: of the whole picture, or what a test gives as its `edit_mask`."""

    def run(self, pipe, size=(128, 128), seed=0, edit_mask=None, **changes):
        if edit_mask is not None:
            mask = Image.fromarray((np.asarray(edit_mask) * 255).astype(np.uint8))
            changes["mask_image"] = mask.resize(size[::-1], Image.Resampling.NEAREST)
        return super().run(pipe, size, seed, **changes)


class TestInpainting(CallConformance):
    """Whole calls: the forward passes are those of the adapters that these derive from, which try them."""

    check_batch = StageConformance.check_batch
    test_samples_of_a_batch_are_independent = StageConformance.test_samples_of_a_batch_are_independent
    test_samples_are_independent_with_every_switch = StageConformance.test_samples_are_independent_with_every_switch
    test_leaves_are_called_in_the_stock_order = StageConformance.test_leaves_are_called_in_the_stock_order
    test_third_party_processors_run_stock = StageConformance.test_third_party_processors_run_stock
    test_methods_that_skip_run_or_are_refused = StageConformance.test_methods_that_skip_run_or_are_refused
    test_a_kept_reference_is_offered_or_refused = StageConformance.test_a_kept_reference_is_offered_or_refused
    test_guidance_only_within_its_range = StageConformance.test_guidance_only_within_its_range
    test_every_attention_setting_gives_the_same_edit = StageConformance.test_every_attention_setting_gives_the_same_edit
    test_every_stage_counts_its_tokens = StageConformance.test_every_stage_counts_its_tokens
    test_forecasts_work_on_every_branch = StageConformance.test_forecasts_work_on_every_branch
    test_forecasts_of_single_tokens_are_offered_or_refused = (
        StageConformance.test_forecasts_of_single_tokens_are_offered_or_refused
    )
    test_features_come_at_growing_size_and_tell_pictures_apart = (
        StageConformance.test_features_come_at_growing_size_and_tell_pictures_apart
    )
    test_locked_cells_that_leave_the_target = SwitchConformance.test_locked_cells_that_leave_the_target
    test_locked_cells_that_are_upsampled_as_pixels = SwitchConformance.test_locked_cells_that_are_upsampled_as_pixels
    test_decoding_the_edited_cells_alone = SwitchConformance.test_decoding_the_edited_cells_alone
    test_a_reference_whose_tokens_are_selected = SwitchConformance.test_a_reference_whose_tokens_are_selected
    test_modulation_is_made_once_or_in_every_step_with_a_reason = (
        ModulationConformance.test_modulation_is_made_once_or_in_every_step_with_a_reason
    )

    @pytest.fixture
    def family(self, inpaint, picture):
        of_call = ("num_inference_steps", "output_type", "max_area")  # each test's own
        arguments = {name: value for name, value in inpaint.arguments.items() if name not in of_call}

        def call(height, width):
            return arguments | dict(image=picture(height, width), mask_image=Image.new("L", (width, height), 255))

        return InpaintFamily(
            make=inpaint.make, call=call, guided=inpaint.guided, others=(), masked=True,
            batch=lambda n: dict(image=[picture(seed=i) for i in range(n)], prompt=["red", "make it large"][:n]),
            **FAMILIES[inpaint.name],
        )  # fmt: skip

    @pytest.mark.parametrize("inpaint", ["kontext", "klein"], indirect=True)  # Qwen's pipeline takes no latents
    def test_numbers_that_are_not_finite_are_refused_before_any_work(self, family, count_calls):
        super().test_numbers_that_are_not_finite_are_refused_before_any_work(family, count_calls)

    # Qwen's pipeline draws the picture's latents, where others take the most likely ones.
    @pytest.mark.parametrize("inpaint", ["kontext", "klein"], indirect=True)
    def test_reused_encodings_change_no_bit(self, family, run_once):
        SwitchConformance.test_reused_encodings_change_no_bit(self, family, run_once)

    @pytest.mark.parametrize("inpaint", ["kontext", "klein"], indirect=True)
    def test_encoding_undoes_what_decoding_does(self, family):
        SwitchConformance.test_encoding_undoes_what_decoding_does(self, family)

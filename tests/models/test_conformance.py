"""Every adapter against the conformance tests."""

import inspect

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageTransformer2DModel

import specedit
from specedit.models.flux import FluxKontext
from specedit.models.longcat import LongCatImageEdit
from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from specedit.testing import QUICK, Conformance, Family
from specedit.testing.cases import Cases
from specedit.testing.conformance import CallConformance
from specedit.testing.stages import StageConformance


@pytest.mark.slow  # tests/models/flux and tests/extension have quick tests
class TestFluxKontext(Conformance):
    # The settings as they are: tests/models/test_graphs.py.
    @pytest.mark.parametrize("changes", [{"rope": "phase_aligned", "attention": "merged"}, {"attention": "stock"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)

    @pytest.fixture
    def family(self, make_pipe, picture):
        def call(height, width):
            return dict(
                image=picture(height, width), prompt="make it red", height=height, width=width,
                max_area=height * width, _auto_resize=False, max_sequence_length=16,
            )  # fmt: skip

        return Family(
            FluxKontext, make_pipe, call, guided=dict(negative_prompt="blue", true_cfg_scale=2.5),
            batch=lambda n: dict(image=[picture(seed=i) for i in range(n)], prompt=["red", "make it large"][:n]),
            runs_others=True,
        )  # fmt: skip


class QwenFamily:
    pipeline, adapter, sends_values, compiles_as = QwenImageEditPipeline, QwenImageEdit, False, None

    @pytest.fixture
    def family(self, make_qwen, picture):
        def call(height, width):
            return dict(image=picture(height, width), prompt="make it red", height=height, width=width)

        return Family(
            self.adapter, lambda: self.make(make_qwen), call,
            guided=dict(negative_prompt="blue and dark", true_cfg_scale=2.5), batch=self.batch(picture),
            sends_values=self.sends_values,
            compiles_as=self.compiles_as,
        )  # fmt: skip

    def make(self, make_qwen):
        return make_qwen(self.pipeline)

    def batch(self, picture):
        return lambda n: dict(image=[picture(seed=i) for i in range(n)], prompt=["red", "make it large"][:n])


@pytest.mark.thorough  # tests/models/qwen has quick tests
class TestQwenImageEdit(QwenFamily, Conformance):
    # The settings as they are, and rope="phase_aligned": tests/models/test_graphs.py.
    @pytest.mark.parametrize("changes", [{"attention": "stock"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)


class PlusFamily(QwenFamily):
    pipeline, adapter, compiles_as = QwenImageEditPlusPipeline, QwenImageEditPlus, "QwenImageEdit"

    def batch(self, picture):  # one prompt a call, but several images of it
        return lambda n: dict(num_images_per_prompt=n)


# Its pipeline, stages and switches are tried by TestQwenImageEdit2511, which diffusers before 0.37 has not.
TRIED = "zero_cond_t" in inspect.signature(QwenImageTransformer2DModel).parameters


@pytest.mark.thorough  # but for several references it is TestQwenImageEdit; tests/models/qwen has quick tests of those
class TestQwenImageEditPlus(PlusFamily, Cases if TRIED else Conformance):
    test_nothing_locked_equals_stock = CallConformance.test_nothing_locked_equals_stock
    test_nothing_locked_equals_stock_beside_a_reference_of_another_size = (
        CallConformance.test_nothing_locked_equals_stock_beside_a_reference_of_another_size
    )
    test_a_reference_lies_where_the_models_own_positions_put_it = (
        CallConformance.test_a_reference_lies_where_the_models_own_positions_put_it
    )
    test_everything_edited_equals_stock = CallConformance.test_everything_edited_equals_stock
    test_uninstall_is_bit_exact = CallConformance.test_uninstall_is_bit_exact
    check_batch = StageConformance.check_batch
    test_samples_of_a_batch_are_independent = StageConformance.test_samples_of_a_batch_are_independent


@pytest.mark.thorough  # but for zero_cond_t it is TestQwenImageEditPlus; tests/models/qwen has quick tests of that
class TestQwenImageEdit2511(PlusFamily, Conformance):
    sends_values = True  # the index of zero_cond_t
    compiles_as = None

    def make(self, make_qwen):
        return make_qwen(self.pipeline, zero_cond_t=True)

    # Attention and rotations are those of TestQwenImageEdit, which tries their settings.
    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)


@pytest.mark.skipif(LongCatImageEdit is None, reason="this diffusers has no LongCatImageEditPipeline")
@pytest.mark.thorough
class TestLongCatImageEdit(Conformance):
    """The guide's proof: an adapter that was written by it, on a pipeline without size arguments or callbacks."""

    @pytest.fixture
    def family(self, make_longcat, picture):
        def call(height, width):
            return dict(image=picture(height, width), prompt="make it red", guidance_scale=1.0)

        return Family(
            LongCatImageEdit, make_longcat, call, guided=dict(negative_prompt="blue", guidance_scale=2.5),
            batch=lambda n: dict(num_images_per_prompt=n),
        )  # fmt: skip

    # Attention and rotations are those of TestFluxKontext.
    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        super().test_other_edits_do_not_compile_again(family, changes)

    def test_a_list_of_one_picture_is_stocks(self, family, picture):
        """Stock resizes no list, so its encoder sees the picture at its own size."""
        given = dict(image=[picture(96, 160)])
        stock = family.run(family.make(), num_inference_steps=2, **given)
        pipe = specedit.install(family.make(), steps=(0, 0, 2))
        self.close(family.run(pipe, **given), stock)
        assert specedit.report(pipe).nfe == 2

    def test_embeddings_of_a_negative_prompt(self, family):
        pipe = specedit.install(family.make(), **QUICK)
        expected = family.run(pipe, **family.guided)
        _, state = family.prepare(family.make(), **family.guided)
        given = dict(guidance_scale=2.5, negative_prompt_embeds=state.conditioning.negative.embeds)
        assert torch.equal(family.run(pipe, **given), expected)
        given["negative_prompt_embeds"] = given["negative_prompt_embeds"][:, 1:]
        with pytest.raises(ValueError, match=r"negative_prompt_embeds: expected shape .*, as the prompt's, got"):
            family.run(pipe, **given)

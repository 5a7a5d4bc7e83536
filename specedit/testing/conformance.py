"""What every adapter must do, whatever the model: a class of tests to derive from. `Family` has the options."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from torch._dynamo.testing import CompileCounter

import specedit
from specedit import SpecEditConfig
from specedit.layout import MixedLayout

from .cases import QUICK, Cases, corner
from .family import (
    at_one_place,
    inside,
    layouts,
    make_picture,
    step_of,
    trace,
)
from .modulation import NO_EFFECT, ModulationConformance, keeps_modulation
from .stages import StageConformance
from .switches import SwitchConformance


class CallConformance(Cases):
    """Tests of whole calls: what is left of the stock pipeline, and what else acts on it."""

    # Nothing locked: a run of only full steps is the stock pipeline's.
    def test_nothing_locked_equals_stock(self, family):
        for i, size in enumerate(family.sizes):
            for guide in self.guides(family, guided=bool(i % 2)):
                pipe = family.make()
                stock = family.run(pipe, size, num_inference_steps=2, **guide)
                for attention in family.attention:
                    specedit.install(pipe, steps=(0, 0, 2), attention=attention)
                    self.close(family.run(pipe, size, **guide), stock)
                    assert specedit.report(pipe).draft_steps == 0

    def test_numbers_that_are_not_finite_are_refused_before_any_work(self, family, count_calls):
        pipe = family.make()
        known = inspect.signature(type(pipe).__call__).parameters
        calls = count_calls(*(getattr(pipe, name) for name in family.parts))
        specedit.install(pipe, **QUICK)
        numbers = [name for name in ("guidance_scale", "true_cfg_scale") if name in known]
        tensors = [n for n in known if n == "latents" or (n.endswith("_embeds") and "ip_adapter" not in n)]
        for name in numbers:
            for value in (float("nan"), float("inf")):
                with pytest.raises(ValueError, match=f"^{name}: expected a finite number, got {value}"):
                    family.run(pipe, **{name: value})
        for name in tensors:
            with pytest.raises(ValueError, match=f"^{name}: expected finite values, got NaN or infinity"):
                family.run(pipe, **{name: torch.full((1, 4, 4), float("nan"))})
        if not family.masked:
            with pytest.raises(ValueError, match=r"^edit_mask: expected finite values, got NaN or infinity"):
                family.run(pipe, edit_mask=torch.full((8, 8), float("nan")))
        assert not calls

    def test_nothing_locked_equals_stock_beside_a_reference_of_another_size(self, family):
        for size, other in family.others[1:3]:
            stock = family.run(family.make(), size, image=make_picture(*other), num_inference_steps=2)
            pipe = specedit.install(family.make(), steps=(0, 0, 2))
            self.close(family.run(pipe, size, image=make_picture(*other)), stock)

    # The placement is the adapter's word for what the stock call does: both have to give one picture of the positions.
    def test_a_reference_lies_where_the_models_own_positions_put_it(self, family):
        if family.rotations is None:
            pytest.skip("there is no table of positions")
        for size, other in family.others:
            stock, image = family.make(), make_picture(*other)
            found = family.rotations(stock, lambda: family.run(stock, size, image=image, num_inference_steps=1))  # noqa: B023
            _, state = family.prepare(family.make(), size, image=image)
            layout = MixedLayout.all_fine(state.grid)
            beside = state.beside(layout)
            target, references = found[-layout.tokens - beside.tokens :].split([layout.tokens, beside.tokens])
            pairs = at_one_place(layout, beside)
            covered = sum(int(placement.covered.sum()) for placement in state.placements)
            assert len(pairs) == covered > 0
            self.close(references[pairs[:, 1]], target[pairs[:, 0]], 1e-5)

    def test_tokens_at_one_place_are_rotated_alike_in_every_stage(self, family):
        if family.rotations is None:
            pytest.skip("there is no table of positions")
        attention = "stock" if "stock" in family.attention else "torch"
        config = SpecEditConfig(attention=attention, key_bias="none")
        for size, other in family.others:
            pipe = family.make()
            adapter, state = family.prepare(pipe, size, config.attention, image=make_picture(*other))
            for layout in layouts(state.grid):
                beside = state.beside(layout)
                if layout.unit != beside.layouts[0].unit:
                    continue  # positions are counted in other units
                found = family.rotations(pipe, step_of(family, adapter, pipe, state, layout, config))
                target, references = found[-layout.tokens - beside.tokens :].split([layout.tokens, beside.tokens])
                pairs = at_one_place(layout, beside)
                assert len(pairs)
                self.close(references[pairs[:, 1]], target[pairs[:, 0]], 1e-5)

    # Everything expanded: a mixed sequence without a locked cell is the stock sequence.
    def test_everything_edited_equals_stock(self, family, run_once):
        mask = torch.ones(8, 8)
        stock, _ = run_once(family, None, num_inference_steps=2)
        pipe = specedit.install(family.make(), steps=(0, 2, 0), restore="reference")
        self.close(family.run(pipe, edit_mask=mask), stock)

    def test_one_negative_prompt_serves_every_prompt(self, family):
        if family.guided is None or "prompt" not in (family.batch or dict)(2):
            pytest.skip("one prompt a call")
        if "negative_prompt" not in family.guided:
            pytest.skip("the negative prompt is always empty")
        call = family.guided | family.batch(2)
        call["prompt"] = call["prompt"][1:] * 2  # of one length: stock of diffusers before 0.37 attends to padding
        each = call | {"negative_prompt": [call["negative_prompt"]] * 2}
        stock = family.run(family.make(), num_inference_steps=3, **each)
        pipe = specedit.install(family.make(), steps=(0, 0, 3))
        self.close(family.run(pipe, **call), stock)
        assert specedit.report(pipe).nfe == 3

    def test_uninstall_is_bit_exact(self, family):
        pipe = family.make()
        before, kept = family.run(pipe, num_inference_steps=2), trace(pipe)
        specedit.install(pipe, **QUICK)
        accelerated = family.run(pipe)
        assert not torch.equal(accelerated, before)
        with specedit.disabled(pipe):
            assert torch.equal(family.run(pipe, num_inference_steps=2), before)
        specedit.uninstall(pipe)
        assert torch.equal(family.run(pipe, num_inference_steps=2), before)
        now = trace(pipe)
        assert now[0] is kept[0]
        assert all(a is b for first, second in zip(kept[1:], now[1:], strict=True) for a, b in zip(first, second))

    def test_a_copy_is_installed_by_itself(self, family, run_once):
        expected, _ = run_once(family, QUICK)
        stock, _ = run_once(family, None, num_inference_steps=2)
        pipe = specedit.install(family.make(), **QUICK)
        assert torch.equal(family.run(pipe), expected)
        copied = copy.deepcopy(pipe)
        assert torch.equal(family.run(copied), expected)
        specedit.uninstall(copied)
        assert torch.equal(family.run(copied, num_inference_steps=2), stock)
        assert torch.equal(family.run(pipe), expected)

    def test_to_its_host_it_is_the_stock_pipeline(self, family):
        pipe = family.make()
        stock = inspect.signature(pipe.__call__)
        signature = inspect.signature(specedit.install(pipe, **QUICK).__call__)
        *parameters, mask = signature.parameters.values()
        assert parameters == list(stock.parameters.values()) and mask.name == "edit_mask"
        assert type(type(pipe)(**pipe.components)) is type(specedit.uninstall(pipe))

    def test_a_stock_pipeline_on_the_same_transformer_stays_stock(self, family, run_once):
        """Also in the middle of an accelerated call in another thread."""
        stock, _ = run_once(family, None, num_inference_steps=2)
        expected, _ = run_once(family, QUICK)
        pipe, other = specedit.install(family.make(), **QUICK), family.make()
        other.transformer = pipe.transformer
        assert torch.equal(family.run(other, num_inference_steps=2), stock)
        images, here = [], threading.get_ident()

        def in_another_thread(*_):
            if threading.get_ident() == here and not images:
                thread = threading.Thread(target=lambda: images.append(family.run(other, num_inference_steps=2)))
                thread.start()
                thread.join()

        handle = inside(pipe, lambda: family.run(pipe)).register_forward_pre_hook(in_another_thread)
        assert torch.equal(family.run(pipe), expected)
        handle.remove()
        self.close(images[0], stock, 1e-5)
        specedit.install(other, **QUICK)
        specedit.uninstall(pipe)
        assert torch.equal(family.run(other), expected)
        assert torch.equal(family.run(pipe, num_inference_steps=2), stock)

    # Hooks that bring weights to the device send every argument there too, and rebuild what they do not know.
    @pytest.mark.parametrize("offload", ["models", "modules"])
    def test_offloading_changes_nothing(self, family, run_once, offload):
        for guide in self.guides(family, guided=offload == "models"):
            expected, _ = run_once(family, QUICK, **guide)
            pipe = family.make()
            for name, part in pipe.components.items():
                if isinstance(part, torch.nn.Module):  # pipelines may share what offloading leaves its marks on
                    setattr(pipe, name, copy.deepcopy(part))
            if offload == "models":
                pipe.enable_model_cpu_offload(device="cpu")
            else:
                for name in ("transformer", "vae"):
                    if isinstance(getattr(pipe, name, None), torch.nn.Module):
                        cpu_offload(getattr(pipe, name), torch.device("cpu"))
            specedit.install(pipe, **QUICK)
            self.close(family.run(pipe, **guide), expected)
            assert specedit.report(pipe).nfe == 4

    @pytest.mark.slow
    def test_compiling_changes_nothing(self, family):
        """Of the transformer as a whole; edits with compiled blocks are compared below."""
        if family.compiles_as:
            pytest.skip(f"its transformer and adapter are those of {family.compiles_as}")
        # Two steps of the mixed stage, because some models are called with other arguments from the second step on.
        settings, mask = dict(steps=(0, 2, 0)), corner()
        expected = family.run(specedit.install(family.make(), **settings), edit_mask=mask)
        kept = trace(pipe := family.make())
        torch._dynamo.reset()
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        specedit.install(pipe, **settings)
        self.close(family.run(pipe, edit_mask=mask), expected)
        specedit.uninstall(pipe)
        assert all(a is b for a, b in zip(kept[1], trace(pipe)[1], strict=True))

    # Every edit has a number of tokens of its own. Stock attention runs prompts of different length one after the other
    # and with a mask or without, which takes more graphs than the compiler allows unasked.
    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}, {"rope": "phase_aligned", "attention": "merged"}, {"attention": "stock"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        """They give what eager blocks give. Kept modulation needs no other graphs."""
        if not family.fullgraph:
            pytest.skip("what crosses a graph break becomes a constant")
        if family.compiles_as:
            pytest.skip(f"its blocks and their inputs are those of {family.compiles_as}")
        self.needs(family, changes)
        counter, counts = CompileCounter(), []
        torch._dynamo.reset()
        pipe, guide = family.make(), self.guides(family)[-1]
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        # In the other stages every edit has the same tokens: the settings as they are go through them.
        settings = QUICK | ({"steps": (0, 2, 0)} if changes else {}) | changes
        specedit.install(pipe, **settings)
        with torch._dynamo.config.patch(recompile_limit=8 if "attention" not in changes else 16):
            for cells in (3, 5, 6, 11):
                mask = (torch.arange(16) < cells).view(4, 4)
                latents = family.run(pipe, edit_mask=mask, **guide)
                counts.append(counter.frame_count)
            # Lengths are marked as dynamic, but for a mask that the model's own processors take.
            known = counts[1 if changes == {"attention": "stock"} else 0]
            assert 0 < known == counts[-1], counts
            eager = specedit.install(family.make(), **settings)
            self.close(latents, family.run(eager, edit_mask=mask, **guide))
            if keeps_modulation(family, family.make()):
                reason = family.adapter().why_modulated_every_step(pipe)
                specedit.install(pipe, **settings, modulation="once")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    self.close(family.run(pipe, edit_mask=mask, **guide), latents)
                assert counter.frame_count == counts[-1]
                assert any(NO_EFFECT in str(one.message) for one in caught) == (reason is not None)
                assert (reason is None) == bool(specedit.report(pipe).modulation)
                assert reason in (None, "its blocks are compiled, and their graphs compute the modulation")


class Conformance(CallConformance, StageConformance, SwitchConformance, ModulationConformance):
    """The tests. A subclass has a fixture `family`."""

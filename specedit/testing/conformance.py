"""What every adapter must do, whatever the model: a class of tests to derive from. `Family` has the options."""

import copy
import dataclasses
import inspect
import threading

import pytest
import torch
from accelerate import cpu_offload
from torch._dynamo.testing import CompileCounter

import specedit
from specedit import SpecEditConfig
from specedit.forecast.toca import KVCache, PartialForward
from specedit.layout import MixedLayout
from specedit.method.adapter import Run
from specedit.method.groups import reference_on_layout
from specedit.models.attention import processors as attention_module

from .family import (
    Ops,
    Shuffled,
    at_one_place,
    group_of,
    inside,
    layouts,
    leaves_called,
    make_picture,
    mixed_layout,
    step_of,
    trace,
)

QUICK = dict(steps=(2, 1, 1), draft_steps=2)


class Conformance:
    """The tests. A subclass has a fixture `family`."""

    def close(self, a, b, tolerance=2e-4):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    @pytest.fixture
    def count_calls(self):
        """A list that grows with every call of some modules."""
        handles = []

        def count(*modules):
            calls = []
            handles.extend(module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in modules)
            return calls

        yield count
        for handle in handles:
            handle.remove()

    def needs(self, family, changes):
        """Skips a test whose configuration the family does not run."""
        offered = {"attention": family.attention, "rope": family.ropes}
        if any(name in changes and changes[name] not in values for name, values in offered.items()):
            pytest.skip(f"this family does not run {changes}")

    def guides(self, family):
        return [{}] if family.guided is None else [{}, family.guided]

    # Nothing locked: a run of only full steps is the stock pipeline's.
    @pytest.mark.parametrize("attention", ["auto", "torch", "stock"])
    def test_nothing_locked_equals_stock(self, family, attention):
        self.needs(family, {"attention": attention})
        for size in family.sizes:
            for guide in self.guides(family):
                stock = family.run(family.make(), size, num_inference_steps=3, **guide)
                pipe = specedit.install(family.make(), steps=(0, 0, 3), attention=attention)
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
                found = family.rotations(pipe, step_of(family, adapter, pipe, state, layout, config))
                target, references = found[-layout.tokens - beside.tokens :].split([layout.tokens, beside.tokens])
                pairs = at_one_place(layout, beside)
                assert len(pairs)
                self.close(references[pairs[:, 1]], target[pairs[:, 0]], 1e-5)

    # Everything expanded: a mixed sequence without a locked cell is the stock sequence.
    def test_everything_edited_equals_stock(self, family):
        mask = torch.ones(8, 8)
        stock = family.run(family.make(), num_inference_steps=3)
        pipe = specedit.install(family.make(), steps=(0, 3, 0), restore="reference")
        self.close(family.run(pipe, edit_mask=mask), stock)

    def test_one_negative_prompt_serves_every_prompt(self, family):
        if family.guided is None or "prompt" not in (family.batch or dict)(2):
            pytest.skip("one prompt a call")
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

    def test_a_copy_is_installed_by_itself(self, family):
        pipe = specedit.install(family.make(), **QUICK)
        expected, copied = family.run(pipe), copy.deepcopy(pipe)
        assert torch.equal(family.run(copied), expected)
        specedit.uninstall(copied)
        stock = family.run(family.make(), num_inference_steps=2)
        assert torch.equal(family.run(copied, num_inference_steps=2), stock)
        assert torch.equal(family.run(pipe), expected)

    def test_to_its_host_it_is_the_stock_pipeline(self, family):
        pipe = family.make()
        stock = inspect.signature(pipe.__call__)
        signature = inspect.signature(specedit.install(pipe, **QUICK).__call__)
        *parameters, mask = signature.parameters.values()
        assert parameters == list(stock.parameters.values()) and mask.name == "edit_mask"
        assert type(type(pipe)(**pipe.components)) is type(specedit.uninstall(pipe))

    def test_a_stock_pipeline_on_the_same_transformer_stays_stock(self, family):
        """Also in the middle of an accelerated call in another thread."""
        pipe, other = family.make(), family.make()
        stock = family.run(other, num_inference_steps=2)
        expected = family.run(specedit.install(pipe, **QUICK))
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
    def test_offloading_changes_nothing(self, family, offload):
        for guide in self.guides(family):
            expected = family.run(specedit.install(family.make(), **QUICK), **guide)
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
        if family.compiles_as:
            pytest.skip(f"its transformer and adapter are those of {family.compiles_as}")
        guide = self.guides(family)[-1]
        expected, kept = family.run(specedit.install(family.make(), **QUICK), **guide), trace(pipe := family.make())
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        specedit.install(pipe, **QUICK)
        self.close(family.run(pipe, **guide), expected)
        specedit.uninstall(pipe)
        assert all(a is b for a, b in zip(kept[1], trace(pipe)[1], strict=True))

    # Every edit has a number of tokens of its own. Stock attention runs prompts of different length one after the other
    # and with a mask or without, which takes more graphs than the compiler allows unasked.
    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}, {"rope": "phase_aligned"}, {"attention": "stock"}])
    def test_other_edits_do_not_compile_again(self, family, changes):
        if not family.fullgraph:
            pytest.skip("what crosses a graph break becomes a constant")
        if family.compiles_as:
            pytest.skip(f"its blocks and their inputs are those of {family.compiles_as}")
        self.needs(family, changes)
        counter, counts = CompileCounter(), []
        torch._dynamo.reset()
        pipe = family.make()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        specedit.install(pipe, **QUICK, **changes)
        with torch._dynamo.config.patch(recompile_limit=8 if "attention" not in changes else 16):
            for cells in (3, 5, 6, 9, 11):
                family.run(pipe, edit_mask=(torch.arange(16) < cells).view(4, 4), **self.guides(family)[-1])
                counts.append(counter.frame_count)
        assert counts[0] and counts[2] == counts[-1], counts

    @pytest.mark.parametrize("changes", [{}, {"key_bias": "none"}, {"rope": "phase_aligned"}, {"attention": "stock"}])
    def test_permuting_tokens_with_their_positions_changes_nothing(self, family, changes):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), config.attention, **guide)
            layout = mixed_layout(state.grid)
            beside = state.beside(layout)
            assert layout.is_mixed and beside.is_mixed
            draw = torch.Generator().manual_seed(1)
            reference = reference_on_layout(state.reference, beside)
            tokens = torch.randn(1, layout.tokens, state.noise.shape[2], generator=draw)
            orders = [torch.randperm(each.tokens, generator=draw) for each in (layout, beside)]

            def velocity(tokens, layout, reference, beside, pipe=pipe, adapter=adapter, state=state):
                with torch.no_grad():
                    group = group_of(state, layout, tokens, reference=reference, beside=beside)
                    return adapter.velocity(Run(adapter, pipe, config, state), group, 0.5)

            expected = velocity(tokens, layout, reference, beside)[:, orders[0]]
            moved = [Shuffled(each, order) for each, order in zip((layout, beside), orders, strict=True)]
            got = velocity(tokens[:, orders[0]], moved[0], reference[:, orders[1]], moved[1])
            self.close(got, expected)
            stayed = Shuffled(layout, orders[0], move=False)
            wrong = velocity(tokens[:, orders[0]], stayed, reference[:, orders[1]], moved[1])
            assert (wrong - expected).abs().max() > 1e-3  # positions matter

    @pytest.mark.parametrize("changes", [{}, {"rope": "phase_aligned"}, {"reference_refresh": 2}])
    def test_what_a_stage_shares_is_made_by_its_first_step(self, family, changes):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), **guide)
            for layout in layouts(state.grid):
                run = step_of(family, adapter, pipe, state, layout, config)
                kept = "reference_refresh" in changes and adapter.keeps_reference
                stores = [KVCache() for _ in range(state.branches if kept else 0)]
                calls = [PartialForward(store) for store in stores] or None
                first, made = run(calls), dict(run.group.inputs)
                if kept:
                    calls = [PartialForward(store, target=True) for store in stores]
                    run(calls)
                with Ops() as later:
                    again = run(calls)
                for a, b in zip(first, again, strict=True):
                    self.close(b, a)
                assert all(run.group.inputs[key] is made[key] for key in run.group.inputs)
                # Nothing that the host would have to wait for: no sizes that depend on masks, no values sent over.
                assert later.names and not later.names["nonzero"]
                assert family.sends_values or not later.names["lift_fresh"]

    @pytest.mark.parametrize("changes", [{}, {"attention": "torch"}, {"rope": "phase_aligned"}])
    def test_the_last_block_computes_what_is_read(self, family, changes):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), config.attention, **guide)
            if not state.trims_last_block:
                pytest.skip("this adapter leaves the last block as it is")
            whole = dataclasses.replace(state, trims_last_block=False)
            for layout in layouts(state.grid):
                trimmed, stock = (step_of(family, adapter, pipe, s, layout, config)() for s in (state, whole))
                for a, b in zip(trimmed, stock, strict=True):
                    self.close(a, b)

    def test_the_last_block_is_stocks_with_stock_attention(self, family):
        self.needs(family, {"attention": "stock"})
        assert not family.prepare(family.make(), attention="stock")[1].trims_last_block

    def test_stock_attention_needs_no_kernels(self, family):
        self.needs(family, {"attention": "stock"})
        backends = [family.prepare(family.make(), attention=attention)[1].backend for attention in ("stock", "auto")]
        assert backends == ["torch", None]

    # diffusers fetches the weights of one leaf after the other, in the order of the first call.
    def test_leaves_are_called_in_the_stock_order(self, family, monkeypatch):
        monkeypatch.setattr(
            attention_module, "_weight_is_resident", lambda *_: False
        )  # as it is of norms that are offloaded
        for guide in self.guides(family):
            pipe = family.make()
            calls = leaves_called(pipe.transformer)
            family.run(pipe, num_inference_steps=1, **guide)
            order, stock = calls[0], len(calls)
            specedit.install(pipe, **QUICK)
            family.run(pipe, **guide)
            assert len(order) > 2 and len(calls) - stock >= sum(QUICK["steps"])
            for call in calls[stock:]:  # what the last block need not compute is left out
                rest = iter(order)
                assert all(name in rest for name in call), [call, order]

    def test_a_processor_of_somebody_else_runs_stock(self, family):
        pipe = family.make()
        if not any(trace(pipe)[1]):
            pytest.skip("this transformer has no attention processors")
        for module in pipe.transformer.modules():
            if (processor := vars(module).get("processor")) is not None:
                processor.__class__ = type("Other", (type(processor),), {"__module__": "elsewhere"})
        stock = family.run(pipe, num_inference_steps=2)
        for attention in ("auto", "torch", "stock")[: 2 if family.runs_others else 3]:
            specedit.install(pipe, attention=attention)
            with pytest.warns(UserWarning, match="its attention processor Other is none of diffusers' own"):
                assert torch.equal(family.run(pipe, num_inference_steps=2), stock)
            specedit.uninstall(pipe)
        if family.runs_others:
            specedit.install(pipe, attention="stock", **QUICK)
            family.run(pipe)
            assert specedit.report(pipe).nfe == 4

    # Keys and values of this very step: then the target's tokens alone give what all tokens give.
    @pytest.mark.parametrize("changes", [{}, {"key_bias": "none"}])
    def test_the_target_alone_beside_kept_keys(self, family, changes):
        self.needs(family, changes)
        config = SpecEditConfig(reference_refresh=2, **changes)
        for guide in self.guides(family):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), **guide)
            if not adapter.keeps_reference:
                pytest.skip("this adapter does not keep the reference")
            for last_block in {state.trims_last_block, False}:
                state = dataclasses.replace(state, trims_last_block=last_block)
                for layout in layouts(state.grid):
                    run = step_of(family, adapter, pipe, state, layout, config)
                    stores = [KVCache() for _ in range(state.branches)]
                    plain, filled = run(), run([PartialForward(store) for store in stores])
                    alone = run([PartialForward(store, target=True) for store in stores])
                    for a, b, c in zip(plain, filled, alone, strict=True):
                        self.close(b, a)
                        self.close(c, a)

    def test_what_is_kept_outlives_a_branch_that_leaves(self, family):
        if family.guided is None or not family.adapter.keeps_reference:
            pytest.skip("there are no two branches that keep anything")
        config = SpecEditConfig(reference_refresh=9, guidance_range=(0.4, 1.0))
        later = dataclasses.replace(config, guidance_range=(0.6, 1.0))
        pipe = family.make()
        adapter, state = family.prepare(pipe, (144, 112), **family.guided)
        for layout in layouts(state.grid):
            both, one = (step_of(family, adapter, pipe, state, layout, each) for each in (config, later))
            stores = [KVCache(), KVCache()]
            filled = both([PartialForward(store) for store in stores])
            assert len(filled) == 2
            (alone,) = one([PartialForward(stores[0], target=True)])
            self.close(alone, filled[0])

    def test_refreshing_every_step_changes_nothing(self, family):
        for guide in self.guides(family):
            runs = []
            for refresh in (None, 1):
                pipe = specedit.install(family.make(), attention="torch", reference_refresh=refresh, **QUICK)
                if not family.adapter.keeps_reference:
                    break
                runs.append(family.run(pipe, **guide))
                assert all(stage.reused == 0 for stage in specedit.report(pipe).stages)
            if runs:
                assert torch.equal(runs[1], runs[0])

    def test_a_kept_reference_is_offered_or_refused(self, family):
        steps = dict(steps=(3, 3, 2), draft_steps=3)
        pipe = specedit.install(family.make(), reference_refresh=2, **steps)
        if not family.adapter.keeps_reference:
            with pytest.raises(ValueError, match=f"reference_refresh: expected None for {family.adapter.name}"):
                family.run(pipe)
            return
        for guide in self.guides(family):
            specedit.install(pipe, reference_refresh=2, **steps)
            kept, report = family.run(pipe, **guide), specedit.report(pipe)
            reused = {stage.name: stage.reused for stage in report.stages if stage.steps}
            assert reused == {"draft": 1, "coarse": 1, "mixed": 1, "full": 1} and report.cache_bytes > 0
            specedit.install(pipe, reference_refresh=None, **steps)
            plain = family.run(pipe, **guide)
            assert specedit.report(pipe).flops > report.flops
            assert kept.isfinite().all() and not torch.equal(kept, plain)

    def test_guidance_only_within_its_range(self, family):
        if family.guided is None:
            pytest.skip("this pipeline has no true guidance")
        steps = dict(steps=(0, 0, 4))
        everywhere, nowhere, some = (
            specedit.install(family.make(), guidance_range=bounds, **steps)
            for bounds in ((0.0, 1.0), (0.001, 0.002), (0.6, 0.9))
        )
        plain = specedit.install(family.make(), **steps)
        guided = family.run(plain, **family.guided)
        assert torch.equal(family.run(everywhere, **family.guided), guided)
        unguided = family.run(nowhere, **family.guided)
        self.close(unguided, family.run(plain))
        assert specedit.report(nowhere).flops == specedit.report(plain).flops  # the negative prompt is not run
        between = family.run(some, **family.guided)
        assert not torch.equal(between, guided) and not torch.equal(between, unguided)
        flops = [specedit.report(pipe).flops for pipe in (nowhere, some, everywhere)]
        assert flops[0] < flops[1] < flops[2]

    def test_samples_of_a_batch_are_independent(self, family):
        self.check_batch(family)

    def test_samples_are_independent_with_every_switch(self, family):
        more = dict(guidance_range=(0.3, 0.9)) | (dict(reference_refresh=2) if family.adapter.keeps_reference else {})
        self.check_batch(family, **more)

    def check_batch(self, family, **more):
        if family.batch is None:
            pytest.skip("this pipeline takes one picture a call")
        for guide in self.guides(family):
            both = family.batch(2)
            alone = [
                {name: value[row : row + 1] if isinstance(value, list) else 1 for name, value in both.items()}
                for row in range(2)
            ]
            if isinstance(both.get("prompt"), list):  # then there is a negative prompt for each of them
                guide = {name: [value] if isinstance(value, str) else value for name, value in guide.items()}
            twice = {name: value * 2 if isinstance(value, list) else value for name, value in guide.items()}
            generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
            pipe = specedit.install(family.make(), **QUICK, **more)
            together = family.run(pipe, generator=generators, **both, **twice)
            assert len(together) == 2
            for row, seed in enumerate((5, 6)):
                generator = torch.Generator().manual_seed(seed)
                self.close(family.run(pipe, generator=generator, **alone[row], **guide)[0], together[row])

    def test_features_come_at_growing_size_and_tell_pictures_apart(self, family):
        pipe = family.make()
        adapter, state = family.prepare(pipe, (144, 112))
        with torch.no_grad():
            features = adapter.features(pipe, state.aligned, state.grid)
            others = adapter.features(pipe, state.noise, state.grid)
        assert len(features) == 3 and all(f.ndim == 4 and len(f) == state.batch for f in features)
        assert features[0].shape[-2:] == (2 * state.grid.height, 2 * state.grid.width)
        assert features[0].shape[-1] <= features[1].shape[-1] <= features[2].shape[-1]
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(features, others, strict=True))

    def test_every_attention_setting_gives_the_same_edit(self, family):
        mask = torch.zeros(8, 8)
        mask[2:5, 2:5] = 1
        runs = []
        for attention in family.attention:
            pipe = specedit.install(family.make(), attention=attention, **QUICK)
            runs.append(family.run(pipe, edit_mask=mask))
        for run in runs[1:]:
            self.close(run, runs[0])

    def test_every_stage_counts_its_tokens(self, family):
        pipe = specedit.install(family.make(), **QUICK)
        family.run(pipe)
        stages = {stage.name: stage for stage in specedit.report(pipe).stages if stage.steps}
        assert list(stages) == ["draft", "coarse", "mixed", "full"]
        tokens = [stage.tokens for stage in stages.values()]
        assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
        assert all(stage.flops > 0 for stage in stages.values())

    # Three steps are computed and the fourth is the third's output again, of every guidance branch.
    def test_forecasts_work_on_every_branch(self, family, monkeypatch):
        original, guided = family.adapter.guide, []

        def guide_and_keep(self, run, outputs):
            guided.append(original(self, run, outputs))
            return guided[-1]

        monkeypatch.setattr(family.adapter, "guide", guide_and_keep)
        for guide in self.guides(family):
            whole = specedit.install(family.make(), steps=(0, 0, 4))
            stock = family.run(whole, **guide)
            pipe = specedit.install(family.make(), steps=(0, 0, 4), forecast="reuse")
            cached = family.run(pipe, **guide)
            assert specedit.report(pipe).cached_steps == 1
            assert specedit.report(pipe).flops == pytest.approx(0.75 * specedit.report(whole).flops, rel=1e-3)
            assert not torch.equal(cached, stock)
            assert torch.equal(guided[-1], guided[-2]) and not torch.equal(guided[-2], guided[-3])

    def test_forecasts_of_single_tokens_are_offered_or_refused(self, family):
        pipe = specedit.install(family.make(), steps=(0, 0, 6), forecast="toca", forecast_interval=2)
        if family.adapter.token_wise:
            assert family.run(pipe).isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"which {family.adapter.name} does not offer"):
                family.run(pipe)

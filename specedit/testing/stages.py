"""Tests of single forward passes, caches, guidance and batches, for every adapter."""

import dataclasses

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.forecast.toca import KVCache, PartialForward
from specedit.layout import MixedLayout
from specedit.method.adapter import Run
from specedit.method.groups import reference_on_layout
from specedit.models.attention import processors as attention_module

from .cases import QUICK, Cases, corner
from .family import (
    Ops,
    Shuffled,
    group_of,
    layouts,
    leaves_called,
    mixed_layout,
    step_of,
    trace,
)


class StageConformance(Cases):
    """Tests of what happens within a stage."""

    @pytest.mark.parametrize(
        ("changes", "guided"),
        [({}, True), ({"key_bias": "none"}, False), ({"rope": "phase_aligned"}, True), ({"attention": "stock"}, True)],
    )
    def test_permuting_tokens_with_their_positions_changes_nothing(self, family, changes, guided):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family, guided):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), config.attention, **guide)
            layout = mixed_layout(state.grid)
            beside = state.beside(layout)
            assert layout.is_mixed and (beside.is_mixed or state.fixed_prefix)
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

    @pytest.mark.parametrize(
        ("changes", "guided"),
        [({}, True), ({"rope": "phase_aligned"}, False), ({"reference_refresh": 2}, True)],
    )
    def test_what_a_stage_shares_is_made_by_its_first_step(self, family, changes, guided):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family, guided):
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
                assert later.names
                assert family.sends_values or not (later.names["nonzero"] or later.names["lift_fresh"])

    @pytest.mark.parametrize(
        ("changes", "guided"), [({}, False), ({"attention": "torch"}, True), ({"rope": "phase_aligned"}, True)]
    )
    def test_the_last_block_computes_what_is_read(self, family, changes, guided):
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family, guided):
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
        for guide in self.guides(family, guided=True):
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

    def test_third_party_processors_run_stock(self, family):
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
    @pytest.mark.parametrize(("changes", "guided"), [({}, True), ({"key_bias": "none"}, False)])
    def test_the_target_alone_with_cached_keys(self, family, changes, guided):
        self.needs(family, changes)
        config = SpecEditConfig(reference_refresh=2, **changes)
        for guide in self.guides(family, guided):
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

    # Keys and values of this very step: then some tokens give what all tokens give.
    def test_some_tokens_with_cached_keys(self, family):
        for guide in self.guides(family, guided=True):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), **guide)
            if not adapter.skips_tokens:
                pytest.skip("this adapter computes all tokens or none")
            last = state.grid.tokens - 1
            first, then = [3, 4, 11, 40, last], [0, 4, 17, 41, last - 2]
            for last_block in {state.trims_last_block, False}:
                state = dataclasses.replace(state, trims_last_block=last_block)
                layout = MixedLayout.all_fine(state.grid)
                run = step_of(family, adapter, pipe, state, layout, SpecEditConfig())
                stores = [KVCache() for _ in range(state.branches)]
                filled = run([PartialForward(store) for store in stores])
                kept = {id(store): dict(store.entries) for store in stores}
                for index in (first, then, first):
                    at = torch.tensor([index]).expand(state.batch, -1)
                    some = run([PartialForward(store, at) for store in stores])
                    for a, b in zip(filled, some, strict=True):
                        self.close(b, a[:, index])
                for store in stores:  # the same tokens' keys took the place of their own
                    for module, pair in store.entries.items():
                        for a, b in zip(pair, kept[id(store)][module], strict=True):
                            self.close(a, b)

    @pytest.mark.parametrize("name", ["spotedit", "regione", "sparge"])
    def test_methods_that_skip_run_or_are_refused(self, family, name):
        adapter = family.adapter
        pipe = family.make()
        if not (adapter.skips_blocks if name == "sparge" else adapter.skips_tokens):
            with pytest.raises(ValueError, match=f"^method: expected another one .* {adapter.name} "):
                specedit.install(pipe, method=name)
            return
        specedit.install(pipe, method=name)
        (guide,) = self.guides(family, guided=True)
        assert family.run(pipe, num_inference_steps=5, **guide).isfinite().all()
        assert specedit.report(pipe).nfe == 5

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
        if not family.adapter.keeps_reference:
            pytest.skip("this adapter does not keep the reference")
        (guide,) = self.guides(family, guided=True)
        runs = []
        for refresh in (None, 1):
            pipe = specedit.install(family.make(), attention="torch", reference_refresh=refresh, **QUICK)
            runs.append(family.run(pipe, **guide))
            assert all(stage.reused == 0 for stage in specedit.report(pipe).stages)
        assert torch.equal(runs[1], runs[0])

    def test_a_kept_reference_is_offered_or_refused(self, family):
        steps = dict(steps=(2, 3, 2), draft_steps=2)
        pipe = family.make()
        if not family.adapter.keeps_reference:
            with pytest.raises(ValueError, match=f"reference_refresh: expected None for {family.adapter.name}"):
                specedit.install(pipe, reference_refresh=2, **steps)
            return
        for guide in self.guides(family, guided=False):
            specedit.install(pipe, reference_refresh=2, **steps)
            kept, report = family.run(pipe, **guide), specedit.report(pipe)
            reused = {stage.name: stage.reused for stage in report.stages if stage.steps}
            assert reused == dict.fromkeys(self.stage_names(family), 1) and report.cache_bytes > 0
            specedit.install(pipe, reference_refresh=None, **steps)
            plain = family.run(pipe, **guide)
            assert specedit.report(pipe).flops > report.flops
            assert kept.isfinite().all() and not torch.equal(kept, plain)

    def test_guidance_only_within_its_range(self, family, run_once):
        if family.guided is None:
            pytest.skip("this pipeline has no true guidance")
        steps = dict(steps=(0, 0, 4))
        everywhere, nowhere, some = (
            specedit.install(family.make(), guidance_range=bounds, **steps)
            for bounds in ((0.0, 1.0), (0.001, 0.002), (0.6, 0.9))
        )
        guided, _ = run_once(family, steps, **family.guided)
        plain, plain_report = run_once(family, steps)
        assert torch.equal(family.run(everywhere, **family.guided), guided)
        unguided = family.run(nowhere, **family.guided)
        self.close(unguided, plain)
        assert specedit.report(nowhere).flops == plain_report.flops  # the negative prompt is not run
        between = family.run(some, **family.guided)
        assert not torch.equal(between, guided) and not torch.equal(between, unguided)
        flops = [specedit.report(pipe).flops for pipe in (nowhere, some, everywhere)]
        assert flops[0] < flops[1] < flops[2]

    def test_samples_of_a_batch_are_independent(self, family):
        self.check_batch(family, guided=False)

    def test_samples_are_independent_with_every_switch(self, family):
        more = dict(guidance_range=(0.3, 0.9)) | (dict(reference_refresh=2) if family.adapter.keeps_reference else {})
        self.check_batch(family, guided=True, **more)

    def check_batch(self, family, guided, **more):
        if family.batch is None:
            pytest.skip("this pipeline takes one picture a call")
        (guide,) = self.guides(family, guided)
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
        side = state.grid.geometry.patch
        assert features[0].shape[-2:] == (side * state.grid.height, side * state.grid.width)
        assert features[0].shape[-1] <= features[1].shape[-1] <= features[2].shape[-1]
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(features, others, strict=True))

    def test_every_attention_setting_gives_the_same_edit(self, family):
        pipe, runs = family.make(), []
        for attention in family.attention:
            specedit.install(pipe, attention=attention, **QUICK)
            runs.append(family.run(pipe, edit_mask=corner()))
        for run in runs[1:]:
            self.close(run, runs[0])

    def test_every_stage_counts_its_tokens(self, family, run_once):
        _, report = run_once(family, QUICK)
        stages = {stage.name: stage for stage in report.stages if stage.steps}
        assert list(stages) == self.stage_names(family)
        tokens = [stage.tokens for stage in stages.values()]
        assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
        assert all(stage.flops > 0 for stage in stages.values())

    # Three steps are computed and the fourth is the third's output again, of every guidance branch.
    def test_forecasts_work_on_every_branch(self, family, run_once, monkeypatch):
        original, guided = family.adapter.guide, []

        def guide_and_keep(self, run, outputs):
            guided.append(original(self, run, outputs))
            return guided[-1]

        monkeypatch.setattr(family.adapter, "guide", guide_and_keep)
        for guide in self.guides(family):
            stock, whole = run_once(family, dict(steps=(0, 0, 4)), **guide)
            pipe = specedit.install(family.make(), steps=(0, 0, 4), forecast="reuse")
            cached = family.run(pipe, **guide)
            assert specedit.report(pipe).cached_steps == 1
            share = specedit.report(pipe).flops / whole.flops
            if (
                family.adapter.fixed_reference or family.adapter.fixed_prefix
            ):  # the first step costs more than the others
                assert 0.75 < share < 0.9
            else:
                assert share == pytest.approx(0.75, rel=1e-3)
            assert not torch.equal(cached, stock)
            assert torch.equal(guided[-1], guided[-2]) and not torch.equal(guided[-2], guided[-3])

    def test_forecasts_of_single_tokens_are_offered_or_refused(self, family):
        pipe, settings = family.make(), dict(steps=(0, 0, 6), forecast="toca", forecast_interval=2)
        if family.adapter.token_wise:
            assert family.run(specedit.install(pipe, **settings)).isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"which {family.adapter.name} does not offer"):
                specedit.install(pipe, **settings)

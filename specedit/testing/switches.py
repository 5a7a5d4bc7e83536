"""Tests of the switches that change which tokens or stages there are, for every adapter."""

import dataclasses

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.forecast.toca import KVCache, PartialForward
from specedit.method.adapter import Run
from specedit.method.reference_selection import ReferenceMass, shorten_reference
from specedit.part_layout import PartLayout

from .cases import QUICK, Cases, corner
from .family import defining_module, group_of, layouts, make_picture, mixed_layout, step_of


class SwitchConformance(Cases):
    """Tests of switches beyond the paper."""

    def test_without_a_draft_the_coarse_stage_is_verified(self, family):
        if family.masked:
            pytest.skip("nothing has to be found")
        (guide,) = self.guides(family, guided=True)
        pipe = specedit.install(family.make(), **QUICK | dict(draft_steps=0), restore="reference")
        latents, report = family.run(pipe, **guide), specedit.report(pipe)
        assert latents.isfinite().all()
        names = [stage.name for stage in report.stages]
        assert names.index("verify") == names.index("coarse") + 1 and "draft" not in names
        assert report.score is not None and report.draft_steps == 0 and report.nfe == sum(QUICK["steps"])
        assert torch.equal(family.run(pipe, **guide), latents)

    def test_reused_encodings_change_no_bit(self, family, run_once):
        """Of the same call again, of one with another seed and its own mask, and of one with another picture."""
        guide = self.guides(family)[-1]
        pipe = specedit.install(family.make(), **QUICK)
        others = [dict(seed=1, edit_mask=corner()), dict(image=make_picture(seed=1))]
        first, _ = run_once(family, QUICK, **guide)
        expected = [first, first, *(family.run(pipe, **guide | call) for call in others)]
        specedit.install(pipe, **QUICK, reuse_encodings=True)
        reused = []
        for call, latents in zip([{}, {}, *others], expected, strict=True):
            assert torch.equal(family.run(pipe, **guide | call), latents)
            reused.append(specedit.report(pipe).reused)
        assert not reused[0] and "findings" not in reused[2] | reused[3] and "pictures" not in reused[3]
        if defining_module(pipe, "encode_prompt").startswith("diffusers."):
            assert reused[1]["prompts"] == reused[2]["prompts"] >= 1 and reused[1]["pictures"] >= 1

    # Keys and values of this very step: then the fine tokens and the text give what all tokens give.
    @pytest.mark.parametrize(("changes", "guided"), [({}, False), ({"key_bias": "none"}, True)])
    def test_fine_tokens_with_cached_keys_of_locked_cells(self, family, changes, guided):
        self.needs(family, changes)
        config = SpecEditConfig(locked="cached", **changes)
        for guide in self.guides(family, guided):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), **guide)
            if not adapter.skips_tokens:
                pytest.skip("this adapter computes all tokens or none")
            layout = mixed_layout(state.grid)
            index = torch.arange(len(layout.locked_cells), layout.tokens).expand(state.batch, -1)
            for last_block in {state.trims_last_block, False}:
                state = dataclasses.replace(state, trims_last_block=last_block)
                run = step_of(family, adapter, pipe, state, layout, config)
                stores = [KVCache() for _ in range(state.branches)]
                plain, filled = run(), run([PartialForward(store) for store in stores])
                some = run([PartialForward(store, index) for store in stores])
                for a, b, c in zip(plain, filled, some, strict=True):
                    self.close(b, a)
                    self.close(c, a[:, index[0]])

    @pytest.mark.parametrize(
        ("changes", "guided"), [({}, True), ({"rope": "phase_aligned"}, True), ({"attention": "stock"}, False)]
    )
    def test_a_target_without_its_locked_cells(self, family, changes, guided):
        """A layout's part of all its tokens is the layout; one without locked cells is another call, but a fine one."""
        self.needs(family, changes)
        config = SpecEditConfig(**changes)
        for guide in self.guides(family, guided):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), config.attention, **guide)
            layout = mixed_layout(state.grid)
            order = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(2))
            tokens = torch.randn(
                state.batch, layout.tokens, state.noise.shape[2], generator=torch.Generator().manual_seed(1)
            )

            def velocity(part, adapter=adapter, pipe=pipe, state=state, layout=layout, tokens=tokens):
                group = group_of(state, part, tokens[:, part.index], beside=state.beside(layout))
                with torch.no_grad():
                    return adapter.velocity(Run(adapter, pipe, config, state), group, 0.5)

            whole = velocity(PartLayout.of(layout, torch.arange(layout.tokens)))
            self.close(velocity(PartLayout.of(layout, order)), whole[:, order])
            fine = PartLayout.fine(layout)
            alone = velocity(fine)
            assert alone.shape[1] == fine.tokens and alone.isfinite().all()
            assert (alone - whole[:, fine.index]).abs().max() > 1e-4

    def test_locked_cells_that_leave_the_target(self, family):
        steps = dict(steps=(2, 3, 1), draft_steps=2)
        offered = ["reference", "cached"] if family.adapter.skips_tokens else ["reference"]
        if "cached" not in offered:
            with pytest.raises(ValueError, match=f"locked: expected 'coarse' or 'reference' for {family.adapter.name}"):
                specedit.install(family.make(), locked="cached", **steps)
        (guide,), everything = self.guides(family, guided=True), torch.ones(8, 8)
        pipe, runs = family.make(), {}
        for locked in ("coarse", *offered):
            specedit.install(pipe, locked=locked, restore="reference", **steps)
            runs[locked] = family.run(pipe, edit_mask=corner(), **guide), specedit.report(pipe).flops
            runs[locked, "all"] = family.run(pipe, edit_mask=everything)
        for locked in offered:
            assert runs[locked][0].isfinite().all() and not torch.equal(runs[locked][0], runs["coarse"][0])
            assert runs[locked][1] < runs["coarse"][1]
            assert torch.equal(runs[locked, "all"], runs["coarse", "all"])

    def test_locked_cells_that_are_upsampled_as_pixels(self, family):
        """Of every size that the pipeline takes: decoded at the coarse size, upsampled, encoded, and one full step."""
        steps = dict(steps=(2, 2, 2), draft_steps=2)
        for size in family.sizes:
            pipe = family.make()
            if not family.adapter.encodes_pixels:
                with pytest.raises(
                    ValueError, match=f"restore: expected 'full' or 'reference' for {family.adapter.name}"
                ):
                    specedit.install(pipe, restore="pixels", **steps)
                return
            specedit.install(pipe, restore="pixels", **steps)
            latents, report = family.run(pipe, size), specedit.report(pipe)
            assert latents.isfinite().all()
            full = report.stages[-2]
            assert report.nfe == 6 and full.name == "full" and full.steps == 1
            assert abs(full.sigma_start - 0.12) < 1e-6 and full.sigma_end == 0
        assert torch.equal(family.run(pipe, size), latents)

    def test_encoding_undoes_what_decoding_does(self, family):
        """The picture being edited, encoded again, has the latents that the pipeline gave it."""
        pipe = family.make()
        adapter, state = family.prepare(pipe)
        if not adapter.encodes_pixels:
            pytest.skip("this adapter does not encode pictures")
        if state.conditioning.source is None:
            pytest.skip("this adapter keeps no source picture")
        with torch.no_grad():
            tokens = adapter.encode(pipe, state.conditioning.source, state.grid)
        assert tokens.dtype == torch.float32
        self.close(tokens, state.aligned, 2e-3)

    def test_decoding_the_edited_cells_alone(self, family):
        """Inside them, the pixels are those of the whole decode, or near them as far as the weights are trained."""
        pipe = family.make()
        adapter, state = family.prepare(pipe)
        if not adapter.decodes_boxes:
            pytest.skip("this adapter decodes whole pictures")
        cells = torch.zeros(state.batch, *state.grid.coarse().shape, dtype=torch.bool)
        cells[:, 0, 0] = True
        with torch.no_grad():
            whole = adapter.decode(pipe, state, state.noise, "pt")
            part, share = adapter.decode_edited(pipe, state, state.noise, "pt", cells)
            every, all_of_it = adapter.decode_edited(pipe, state, state.noise, "pt", torch.ones_like(cells))
        side = 2 * state.pixels_per_token
        assert part.shape == whole.shape and 0 < share <= 1 and all_of_it == 1
        self.close(every, whole, 1e-4)
        if share == 1 or not adapter.approximates_boxes:
            self.close(part[..., :side, :side], whole[..., :side, :side], 1e-4)
        assert adapter.approximates_boxes or share < 1
        assert part.isfinite().all()

    def test_a_reference_whose_tokens_are_selected(self, family):
        """What a part of the reference is, follows its positions; a run measures, shortens and ends."""
        steps = dict(steps=(2, 3, 2), draft_steps=2)
        if not family.adapter.measures_attention:
            with pytest.raises(ValueError, match=f"reference_keep: expected None for {family.adapter.name}"):
                specedit.install(family.make(), reference_keep=0.15, **steps)
            return
        (guide,), pipe, runs = self.guides(family, guided=True), family.make(), {}
        for keep in (None, 1.0, 0.15):
            specedit.install(pipe, reference_keep=keep, **steps)
            runs[keep] = family.run(pipe, edit_mask=corner(), **guide), specedit.report(pipe).flops
        assert torch.equal(runs[1.0][0], runs[None][0]) and runs[1.0][1] == runs[None][1]
        assert runs[0.15][0].isfinite().all() and not torch.equal(runs[0.15][0], runs[None][0])
        assert runs[0.15][1] < runs[None][1]

    def test_attention_is_measured_beside_what_is_computed(self, family):
        for guide in self.guides(family, guided=True):
            pipe = family.make()
            adapter, state = family.prepare(pipe, (144, 112), **guide)
            if not adapter.measures_attention:
                pytest.skip("this adapter does not measure attention")
            for layout in layouts(state.grid):
                outputs, totals = [], []
                for last_block in {state.trims_last_block, False}:
                    trimmed = dataclasses.replace(state, trims_last_block=last_block)
                    run = step_of(family, adapter, pipe, trimmed, layout, SpecEditConfig())
                    plain, group = run(), run.group
                    first = torch.zeros(group.reference_layout.tokens, dtype=torch.bool)
                    group.mass = ReferenceMass(torch.arange(0, layout.tokens, 3), first, 5)
                    outputs.append((plain, run()))
                    totals.append(group.mass.total)
                    reference, layout_before = group.reference, group.reference_layout
                    shorten_reference(group)
                    assert group.reference.shape[1] == group.reference_layout.tokens == 5 and group.mass is None
                    assert layout_before.tokens == reference.shape[1] > 5
                    assert all(out.isfinite().all() for out in run())
                for plain, measured in outputs:
                    for a, b in zip(plain, measured, strict=True):
                        self.close(b, a)
                assert all(total.shape == first.shape and (total > 0).all() for total in totals)
                self.close(totals[-1] / totals[-1].sum(), totals[0] / totals[0].sum())

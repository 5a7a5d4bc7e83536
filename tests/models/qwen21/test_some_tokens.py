"""Steps over some of the target's tokens: what they find of the others, where they write, and what is padding."""

import copy

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.forecast.kv_cache import Fusion, KVCache, PartialForward
from specedit.layout import MixedLayout
from specedit.models import qwen21
from specedit.testing.family import step_of
from tests.models.whole_calls import CORNER, close

if qwen21.QwenImage21 is None:
    pytest.skip("this diffusers has no Qwen-Image-2.1", allow_module_level=True)

from specedit.models.qwen21.positions import frequencies, spans
from specedit.models.qwen21.prefix import frame_of

CACHED = dict(steps=(1, 4, 1), draft_steps=2, uniform_stride=0, locked="cached", restore="reference")


def layout_of(grid, expanded):
    """So many cells of the coarse grid expanded, spread over it."""
    cells = torch.zeros(grid.coarse().shape, dtype=torch.bool)
    cells.view(-1)[torch.arange(expanded) * 3] = True
    return MixedLayout(grid, cells)


@pytest.fixture
def step(family):
    """Calls the adapter at a layout and a noise level, and what else is known then."""

    def make(expanded, **config):
        pipe = family.make()
        adapter, state = family.prepare(pipe, (128, 128))
        layout = layout_of(state.grid, expanded)
        return step_of(family, adapter, pipe, state, layout, SpecEditConfig(**config)), pipe, state, layout

    return make


def fine_tokens(layout):
    return torch.arange(len(layout.locked_cells), layout.tokens)[None]


@pytest.mark.parametrize("expanded", [1, 2, 3, 4])
def test_every_token_computed_anew_is_a_step_over_all(step, expanded):
    """Whatever padding the target takes, and whatever noise level the keys are of."""
    run, _, state, layout = step(expanded)
    assert -layout.tokens % 4 == expanded % 4  # 16 cells and three more tokens for each that is expanded
    expected = run()[0]
    store = KVCache()
    run.group.tokens = run.group.tokens + 1  # what is kept is of other tokens
    run([PartialForward(store)])
    run.group.tokens = run.group.tokens - 1
    everything = torch.arange(layout.tokens)
    for index in (everything, everything.flip(0)):
        close(run([PartialForward(store, index[None])])[0], expected[:, index])


@pytest.mark.parametrize("expanded", [1, 2, 4])
@pytest.mark.parametrize("bias", ["area", "none"])
def test_keys_that_are_kept_are_those_of_the_step_before(step, expanded, bias):
    """Against the model written out in float64, beside keys and values of another step."""
    run, pipe, state, layout = step(expanded, key_bias=bias)
    before, everything = run.group.tokens, torch.arange(layout.tokens)
    after = before * 0.5 + 0.3
    for index in (fine_tokens(layout), fine_tokens(layout)[:, 1:]):  # four to a cell, and a number that is padded
        store, run.group.tokens = KVCache(), before
        run([PartialForward(store)])
        run.group.tokens = after
        got = run([PartialForward(store, index)])[0]
        plain = Plain(pipe, state, layout, bias)
        expected, _ = plain(after, index[0], plain(before, everything)[1])
        close(got, expected.float())
        fresh = plain(after, everything)[0][:, index[0]]
        assert (expected - fresh).abs().max() > 1e-3  # the others' keys matter


class Plain:
    """The transformer over a target, in float64, from its modules alone."""

    def __init__(self, pipe, state, layout, bias):
        self.model = copy.deepcopy(pipe.transformer).double()
        self.prefix = [[x.double() for x in layer] for layer in state.conditioning.prefixes[0].layers]
        positions, area = spans(layout, state.grid)
        frame = frame_of(state.conditioning.positive.words, state.reference_grid.grids)
        self.turn = frequencies(pipe.transformer.pos_embed, frame, positions, state.grid).to(torch.complex128)
        self.bias = area.double().log() if bias == "area" else torch.zeros(layout.tokens, dtype=torch.float64)

    def __call__(self, tokens, index, kept=None):
        """The output (b, m, C) of the tokens `index`, and every block's keys and values of all."""
        model, made = self.model, []
        x = model.img_in(tokens[:, index].double())
        embedding = model.time_text_embed(torch.tensor([0.5], dtype=torch.float64), x)
        first, second = model.modulation(embedding)[:, None].chunk(2, -1)
        for i, block in enumerate(model.transformer_blocks):
            scale, gate = first.chunk(2, -1)
            attended, pair = self.attention(block.attn, block.img_norm1(x) * (1 + scale), i, index, kept)
            x = x + gate.tanh() * attended
            scale, gate = second.chunk(2, -1)
            x = x + gate.tanh() * block.img_mlp(block.img_norm2(x) * (1 + scale))
            made.append(pair)
        return model.proj_out(model.norm_out(x, embedding)), made

    def attention(self, attn, x, i, index, kept):
        q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (self.rotated(norm(y), index) for norm, y in ((attn.norm_q, q), (attn.norm_k, k)))
        if kept is not None:
            (old_k, old_v), new_k, new_v = kept[i], k, v
            k, v = old_k.clone(), old_v.clone()
            k[:, index], v[:, index] = new_k, new_v
        keys, values = (torch.cat(pair, 1) for pair in zip(self.prefix[i], (k, v), strict=True))
        logits = torch.einsum("bihd,bjhd->bhij", q, keys) / q.shape[-1] ** 0.5
        logits[..., -len(self.bias) :] += self.bias
        return attn.to_out[0](torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), values).flatten(2)), (k, v)

    def rotated(self, x, index):
        turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * self.turn[index, None]
        return torch.view_as_real(turned).flatten(-2)


def test_a_step_writes_its_own_rows_alone(step):
    run, _, _, layout = step(3)
    index, store = fine_tokens(layout), KVCache()
    run([PartialForward(store)])
    before = dict(store.entries)
    run.group.tokens = run.group.tokens.roll(1, 1)
    run([PartialForward(store, index)])
    own = torch.zeros(-layout.tokens % 4 + layout.tokens, dtype=torch.bool)
    own[-layout.tokens % 4 + index[0]] = True
    assert store.text_tokens == -layout.tokens % 4 and (~own).sum() > len(layout.locked_cells)
    for module, pair in store.entries.items():
        for new, old in zip(pair, before[module], strict=True):
            assert torch.equal(new[:, ~own], old[:, ~own])
            assert (new - old).abs().amax((0, 2, 3))[own].min() > 1e-3


def test_kept_keys_take_the_references_place(step):
    """Fused whole, a token's values are the reference's, and its keys are turned to the target's place in the text."""
    run, pipe, state, layout = step(2)
    index, store = fine_tokens(layout), KVCache()
    run([PartialForward(store)])
    rows, tokens = torch.tensor([[0, 5]]), torch.tensor([[9, 30]])
    run([PartialForward(store, index, fusion=Fusion(rows, tokens, 0.0))])
    prompt, rope = state.conditioning.positive, pipe.transformer.pos_embed
    start = int(prompt.slots[0].int().argmax())  # the words before the picture, whose tokens follow in a row
    grid, own = state.reference_grid.grids[0], spans(layout, state.grid)[0][rows[0]]
    at = grid.positions()[tokens[0]]
    frame = frame_of(prompt.words, (grid,))
    turns = frequencies(rope, frame, own, state.grid) / frequencies(rope, start, at, grid)
    for attn, (k, v) in store.entries.items():
        number = [block.attn for block in pipe.transformer.transformer_blocks].index(attn)
        prefix_k, prefix_v = (x[:, start + tokens[0]] for x in state.conditioning.prefixes[0].layers[number])
        kept_k, kept_v = (x[:, -layout.tokens % 4 + rows[0]] for x in (k, v))
        assert torch.equal(kept_v, prefix_v)
        turned = torch.view_as_complex(prefix_k.unflatten(-1, (-1, 2)).contiguous()) * turns[:, None]
        close(kept_k, torch.view_as_real(turned).flatten(-2))


def test_steps_between_compute_the_fine_tokens(family):
    """Without text, references and locked cells; where all are computed, padded to a multiple of four."""
    pipe, sizes = specedit.install(family.make(), **CACHED), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    family.run(pipe, edit_mask=CORNER)
    report = specedit.report(pipe)
    edited = int(report.expand_mask.sum())
    target = 16 + 3 * edited
    assert sizes[-6:] == [16, target + -target % 4, *[4 * edited] * 4]
    assert report.reused_steps == 4 and 0 < edited < 16


def test_a_preset_keeps_locked_cells(family):
    for preset, reused in (("ultra", 6), ("few-8", 6), ("few-4", 2)):
        pipe = specedit.install(family.make(), preset)
        family.run(pipe, edit_mask=CORNER)
        report = specedit.report(pipe)
        assert report.config.locked == "cached" and report.config.preset_name == preset
        assert report.reused_steps == reused


def test_a_replaced_prompt_computes_every_token_anew(family):
    pipe = specedit.install(family.make(), **CACHED)

    def end(pipe, i, t, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]} if i == 2 else {}

    family.run(pipe, edit_mask=CORNER, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert specedit.report(pipe).reused_steps == 3


def test_without_the_stock_cache_nothing_changes(family):
    pipe = specedit.install(family.make(), **CACHED)
    kept = family.run(pipe, edit_mask=CORNER)
    assert torch.equal(family.run(pipe, edit_mask=CORNER, use_kv_cache=False), kept)


@pytest.mark.slow
@pytest.mark.parametrize("config", [dict(forecast="toca"), dict(forecast="duca"), dict(method="spotedit")], ids=str)
def test_what_computes_single_tokens_runs_on_padded_prompts_too(family, config):
    """Each sample of a batch chooses its own tokens; the shorter prompt's padding is hidden from all."""
    mask, steps = (CORNER, {}) if "method" in config else (None, dict(steps=(1, 3, 5), forecast_interval=3))
    pipe = specedit.install(family.make(), **config, **steps)
    prompts = dict(prompt=["red", "make it large"], num_inference_steps=9, edit_mask=mask)
    runs = []
    for negative in ({}, dict(negative_prompt=["x", "much longer"], true_cfg_scale=2.5)):
        runs.append(family.run(pipe, **prompts, **negative))
        report = specedit.report(pipe)
        assert runs[-1].isfinite().all() and report.nfe == 9 and report.cached_steps + report.reused_steps > 0
    assert (runs[1] - runs[0]).abs().max() > 1e-3

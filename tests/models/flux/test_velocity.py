"""The transformer of FLUX on every layout, against the stock call."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from specedit import SpecEditConfig
from specedit.layout import MixedLayout
from specedit.method.adapter import Run, rows_index
from specedit.method.groups import reference_on_layout
from specedit.models.attention import processors as attention
from specedit.models.attention import sequences
from specedit.testing.family import Ops, group_of
from tests.models.flux.common import random_like


def mixed_layout(grid, share=0.4):
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(0)) < share)


def velocity(prepared, layout, config, sigma=0.6, tokens=None, reference_layout=None):
    adapter, pipe, state = prepared
    reference_layout = reference_layout or state.beside(layout)
    reference = reference_on_layout(state.reference, reference_layout)
    tokens = random_like(layout, state.batch) if tokens is None else tokens
    group = group_of(state, layout, tokens, reference=reference, beside=reference_layout)
    return adapter.velocity(Run(adapter, pipe, config, state), group, sigma)


@pytest.mark.parametrize("attention", ["auto", "merged", "torch", "stock"])
@pytest.mark.parametrize("split", [True, False], ids=["fine", "coarse"])
def test_velocity_of_one_resolution_is_the_stock_call(prepare, attention, split):
    adapter, pipe, state = prepare(attention)
    layout = (MixedLayout.all_fine if split else MixedLayout.all_coarse)(state.grid)
    side = 8 if split else 4
    got = velocity((adapter, pipe, state), layout, SpecEditConfig(attention=attention))
    adapter.detach(pipe)
    embeds, pooled, text_ids = pipe.encode_prompt("make it red", None, max_sequence_length=8)
    ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    tokens = random_like(layout)
    reference = reference_on_layout(state.reference, layout)
    expected = pipe.transformer(
        hidden_states=torch.cat([tokens, reference], 1), timestep=torch.tensor([0.6]), guidance=torch.tensor([3.5]),
        pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids,
        img_ids=torch.cat([ids, reference_ids]), return_dict=False,
    )[0][:, : layout.tokens]  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_bias", ["area", "none"])
@pytest.mark.parametrize("attention", ["torch", "stock", "auto"])
def test_permuting_tokens_with_their_positions_changes_nothing(prepare, attention, key_bias):
    check_permutation(prepare, SpecEditConfig(attention=attention, key_bias=key_bias))


def test_permuting_tokens_under_phase_aligned_rope(prepare):
    check_permutation(prepare, SpecEditConfig(rope="phase_aligned"))


def check_permutation(prepare, config):
    adapter, pipe, state = prepare(config.attention, height=144, width=112, max_area=144 * 112)
    layout = mixed_layout(state.grid, 0.1)
    reference_layout = state.beside(layout)
    reference, tokens = reference_on_layout(state.reference, reference_layout), random_like(layout)
    assert layout.is_mixed and reference_layout.is_mixed

    def shuffled(layout, seed):
        order = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(seed))
        moved = SimpleNamespace(positions=layout.positions[order], area=layout.area[order], is_mixed=True)
        return order, moved

    def call(tokens, layout, reference, reference_layout):
        group = group_of(state, layout, tokens, reference=reference, beside=reference_layout)
        return adapter.velocity(Run(adapter, pipe, config, state), group, 0.5)

    order, moved = shuffled(layout, 1)
    reference_order, reference_moved = shuffled(reference_layout, 2)
    expected = call(tokens, layout, reference, reference_layout)[:, order]
    got = call(tokens[:, order], moved, reference[:, reference_order], reference_moved)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stayed = SimpleNamespace(positions=layout.positions, area=moved.area, is_mixed=True)
    wrong = call(tokens[:, order], stayed, reference[:, reference_order], reference_moved)
    assert (wrong - expected).abs().max() > 1e-3  # positions matter


@pytest.mark.parametrize("key_bias", ["area", "none"])
def test_attention_stock_and_torch_agree(prepare, key_bias):
    prepared = prepare("torch")
    layout = mixed_layout(prepared[2].grid)
    results = [
        velocity(prepared, layout, SpecEditConfig(attention=attention, key_bias=key_bias))
        for attention in ("torch", "stock", "auto")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0], results[2])


def test_key_bias_and_rope_change_a_mixed_sequence_only(prepare):
    prepared = prepare()
    grid = prepared[2].grid
    configs = [SpecEditConfig(), SpecEditConfig(key_bias="none"), SpecEditConfig(rope="phase_aligned")]
    for layout, differ in ((mixed_layout(grid), True), (MixedLayout.all_fine(grid), False)):
        area, none, aligned = (velocity(prepared, layout, config) for config in configs)
        assert ((area - none).abs().max() > 1e-4) == differ
        assert ((area - aligned).abs().max() > 1e-4) == differ


def test_the_transformer_receives_token_positions(prepare, monkeypatch):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    seen = {}
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs))
    layout = mixed_layout(state.grid)
    reference_layout = state.beside(layout)
    velocity((adapter, pipe, state), layout, SpecEditConfig(), sigma=0.25)
    ids = seen["img_ids"]
    assert ids.dtype == torch.float32 and (ids % 1 == 0.5).any()
    assert torch.equal(ids[: layout.tokens, 1:], layout.positions) and (ids[: layout.tokens, 0] == 0).all()
    assert torch.equal(ids[layout.tokens :, 1:], reference_layout.positions) and (ids[layout.tokens :, 0] == 1).all()
    assert seen["timestep"].item() == pytest.approx(0.25)
    context = seen["joint_attention_kwargs"]["specedit"]
    area = torch.cat([torch.ones(8), layout.area, reference_layout.area])
    torch.testing.assert_close(context.key_bias.exp(), area)


def test_true_cfg(prepare):
    guided = prepare(negative_prompt="blue", true_cfg_scale=2.5)
    assert guided[2].branches == 2
    layout = mixed_layout(guided[2].grid)
    got = velocity(guided, layout, SpecEditConfig())
    positive = velocity(prepare(), layout, SpecEditConfig())
    negative = velocity(prepare(prompt="blue"), layout, SpecEditConfig())
    torch.testing.assert_close(got, negative + 2.5 * (positive - negative), rtol=1e-4, atol=1e-5)
    assert prepare(negative_prompt="blue", true_cfg_scale=1.0)[2].branches == 1
    assert prepare(true_cfg_scale=2.5)[2].branches == 1


def test_rows_pick_their_own_prompts(prepare):
    adapter, pipe, state = prepare(prompt=["make it red", "make it blue and large"])
    layout = MixedLayout.all_coarse(state.grid)
    tokens = random_like(layout, 2)
    run = Run(adapter, pipe, SpecEditConfig(), state)
    both = adapter.velocity(run, group_of(state, layout, tokens), 0.5)
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = adapter.velocity(run, group_of(state, layout, tokens[one], [row]), 0.5)
        torch.testing.assert_close(alone, both[one], rtol=1e-5, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4


@pytest.mark.parametrize("rope", ["scaled", "phase_aligned"])
@pytest.mark.parametrize("rows", [[0, 1], [1], [0, 2]])
def test_what_a_stage_shares_is_made_by_its_first_step(prepare, monkeypatch, rope, rows):
    adapter, pipe, state = prepare("torch", prompt=["red", "blue and large", "no more than green"])
    layout = mixed_layout(state.grid)
    group = group_of(state, layout, random_like(layout, len(rows)), rows)
    config = SpecEditConfig(rope=rope, attention="torch")
    made = Counter()
    for module, name in ((attention, "half_table"), (sequences, "segments")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: made.update([n]) or f(*a))
    pipe.transformer.pos_embed.register_forward_hook(lambda *a: made.update(["pos_embed"]))

    def step():
        return adapter.velocity(Run(adapter, pipe, config, state), group, 0.5)

    first = step()
    tables = 1 if rope == "scaled" else 2
    # Segments of all queries, and of those that the last block computes.
    assert made == {"half_table": 2 * tables, "pos_embed": tables + 1} | ({"segments": 2} if tables == 2 else {})
    with Ops() as later:
        again = step()
    assert torch.equal(first, again)
    assert made["half_table"] == 2 * tables and made["pos_embed"] == tables + 2  # the transformer's own is left
    # Nothing that the host would have to wait for: no sizes that depend on masks, no values sent to the device.
    assert later.names["addmm"] and not later.names["nonzero"] and not later.names["lift_fresh"]
    group.inputs.clear()
    assert torch.equal(step(), first) and made["half_table"] == 4 * tables


def test_stages_do_not_share_what_is_theirs(prepare):
    adapter, pipe, state = prepare()
    sparse, dense = mixed_layout(state.grid, 0.2), mixed_layout(state.grid, 0.6)
    config = SpecEditConfig()
    one, other = (velocity((adapter, pipe, state), layout, config) for layout in (sparse, dense))
    for layout, expected in ((sparse, one), (dense, other)):
        assert torch.equal(velocity((adapter, pipe, state), layout, config), expected)
        assert torch.equal(velocity(prepare(), layout, config), expected)  # another run, nothing made before


def test_a_prompt_that_a_callback_changes_is_seen_at_once(prepare):
    prepared = prepare()
    layout = mixed_layout(prepared[2].grid)
    before = velocity(prepared, layout, SpecEditConfig())
    prepared[2].conditioning.prompt_embeds.mul_(2)
    assert not torch.equal(velocity(prepared, layout, SpecEditConfig()), before)


@pytest.mark.parametrize("rows", [[0], [3], [0, 1, 2], [2, 3], [0, 2], [2, 1], [3, 3]])
def test_rows_index_picks_as_a_list_does(rows):
    x = torch.arange(8).view(4, 2)
    index = rows_index(rows, "cpu")
    assert torch.equal(x[index], x[rows])
    assert isinstance(index, slice) == (rows in ([0], [3], [0, 1, 2], [2, 3]))

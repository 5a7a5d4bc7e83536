"""Kept keys and values of text and reference: when they are refreshed, and that nothing stale is used."""

from collections import Counter

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.flops import transformer_flops
from specedit.forecast import ReferenceKVCache
from specedit.forecast.toca import KVCache

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
CENTRE = np.zeros((128, 128), dtype=bool)
CENTRE[40:90, 40:120] = True


def rows_of(pipe):
    """Image tokens of every transformer call."""
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("every", "fresh"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_refreshed_every_so_many_steps(every, fresh):
    kept = ReferenceKVCache(every)
    calls = [kept.calls(step, 1) for step in range(5)]
    assert [i for i, (call,) in enumerate(calls) if not call.target] == fresh
    for i, (call,) in enumerate(calls):  # a refresh fills another store than the one before
        assert (i > 0 and call.store is calls[i - 1][0].store) == (i not in fresh)


def test_steps_that_a_forecast_answered_count():
    kept = ReferenceKVCache(3)
    assert [kept.calls(step, 1)[0].target for step in (0, 2, 4, 6, 8)] == [False, True, False, True, False]


def test_a_branch_that_joins_brings_a_refresh():
    kept = ReferenceKVCache(9)
    calls = [kept.calls(step, branches) for step, branches in enumerate([1, 1, 2, 2, 1, 1, 2])]
    assert [len(each) for each in calls] == [1, 1, 2, 2, 1, 1, 2]
    assert [each[0].target for each in calls] == [False, True, False, True, True, True, False]
    assert calls[3][0].store is not calls[3][1].store and calls[4][0].store is calls[3][0].store


def test_a_store_drops_positions_beyond_its_length():
    store = KVCache({1: (torch.arange(6.0).view(1, 6, 1, 1), torch.ones(1, 6, 1, 2))})
    store.keep(6)
    assert store.memory == 4 * 18
    store.keep(4)
    k, v = store.entries[1]
    assert k.flatten().tolist() == [0, 1, 2, 3] and v.shape == (1, 4, 1, 2) and store.memory == 4 * 12


def test_a_new_prompt_brings_a_refresh():
    kept, prompt = ReferenceKVCache(9), torch.zeros(1)
    for step, fresh in enumerate((True, False)):
        kept.reset_if_prompt_changed(prompt)
        assert kept.calls(step, 1)[0].target != fresh
    prompt.add_(1)  # the same tensor, with other words
    kept.reset_if_prompt_changed(prompt)
    assert not kept.calls(2, 1)[0].target
    kept.reset_if_prompt_changed(torch.zeros(1))
    assert not kept.calls(3, 1)[0].target
    with torch.inference_mode():  # whose tensors do not count
        kept.reset_if_prompt_changed(torch.zeros(1))
    assert not kept.calls(4, 1)[0].target
    kept.reset_if_prompt_changed(None)


def test_every_stage_begins_with_a_refresh(pipe, edit):
    specedit.install(pipe, steps=(3, 3, 3), draft_steps=3, reference_refresh=2)
    seen = rows_of(pipe)
    edit(pipe)
    stages = [stage for stage in specedit.report(pipe).stages if stage.steps]
    image = [int(stage.tokens) - 16 for stage in stages]
    assert seen == [rows for n in image for rows in (n, n // 2, n)]
    assert [(stage.name, stage.reused) for stage in stages] == [("draft", 1), ("coarse", 1), ("mixed", 1), ("full", 1)]


def test_flops_and_memory_are_counted(pipe, edit):
    specedit.install(pipe, steps=(0, 0, 5), reference_refresh=2)
    edit(pipe)
    report, model = specedit.report(pipe), pipe.transformer.config
    whole, alone = transformer_flops(model, 144, None, 64), transformer_flops(model, 64, 144, 64)
    assert report.flops == 3 * whole + 2 * alone
    assert report.cache_bytes == 4 * 2 * 2 * 144 * 32  # float32, keys and values, blocks, tokens, width
    assert report.to_dict()["stages"][-2]["reused"] == 2
    edit(pipe, negative_prompt="dull", true_cfg_scale=3.0)
    assert specedit.report(pipe).flops == 2 * (3 * whole + 2 * alone)


def test_reference_refresh_with_a_forecast(pipe, edit):
    specedit.install(pipe, steps=(0, 0, 12), forecast="reuse", forecast_interval=2, reference_refresh=4)
    seen = rows_of(pipe)
    edit(pipe)
    assert seen == [128, 64, 64, 128, 64, 128, 64]  # steps 0, 1, 2, 4, 6, 8, 10
    predicted = specedit.flops.plan(specedit.SpecEditConfig(
        steps=(0, 0, 12), forecast="reuse", forecast_interval=2, reference_refresh=4
    ), "flux-kontext", 128, 128, 1.0)["stages"]  # fmt: skip
    stage = specedit.report(pipe).stages[-2]
    report = specedit.report(pipe)
    assert "NFE 12 (5 cached, 4 on the target alone)" in str(report) and report.to_dict()["reused_steps"] == 4
    assert (stage.cached, stage.reused) == (predicted[0]["cached"], predicted[0]["reused"]) == (5, 4)


def test_samples_with_masks_of_their_own(pipe, edit, picture):
    specedit.install(pipe, steps=(3, 3, 2), reference_refresh=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = edit(
        pipe, image=[picture(seed=1), picture(seed=2)], prompt=["red", "large"], generator=generators,
        edit_mask=torch.from_numpy(np.stack([CORNER, CENTRE])),
    )  # fmt: skip
    for row, (mask, prompt) in enumerate([(CORNER, "red"), (CENTRE, "large")]):
        alone = edit(pipe, image=picture(seed=row + 1), prompt=prompt, seed=5 + row, edit_mask=mask)
        torch.testing.assert_close(both[row], alone[0], rtol=1e-5, atol=1e-5)


def test_a_callback_that_replaces_the_prompt(pipe, edit):
    specedit.install(pipe, steps=(0, 0, 6), reference_refresh=6)
    other, _, _ = pipe.encode_prompt("add a boat", None, max_sequence_length=16)
    seen = rows_of(pipe)
    swap = lambda pipe, index, timestep, tensors: {"prompt_embeds": other} if index == 2 else {}  # noqa: E731
    edit(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [128, 64, 64, 128, 64, 64]


def test_nothing_is_left_behind(pipe, edit):
    before = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, steps=(0, 0, 6), reference_refresh=3)
    expected = edit(pipe)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 3  # between two refreshes
        return {}

    edit(pipe, prompt="something else", seed=9, callback_on_step_end=stop)
    assert torch.equal(edit(pipe), expected)
    specedit.uninstall(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), before)


def test_odd_sizes_and_reference_restore(pipe, edit):
    specedit.install(pipe, steps=(4, 3, 3), restore="reference", reference_refresh=3)
    mask = np.zeros((144, 176))
    mask[:40, :40] = 1
    latents = edit(pipe, (144, 176), edit_mask=mask)
    assert latents.shape == (1, 99, 16) and latents.isfinite().all()
    assert Counter(stage.reused for stage in specedit.report(pipe).stages if stage.steps) == {2: 1, 4: 1}

"""Classifier-free guidance of the Qwen adapters."""

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.cost.flops import transformer_flops
from specedit.layout import MixedLayout
from specedit.models.qwen.prompts import QwenPrompt, text_counts
from specedit.testing.family import mixed_layout
from tests.models.qwen.common import GUIDED, QUICK, close, velocity


def guided(positive, negative):
    """Classifier-free guidance at 2.5, rescaled to the norm under the prompt."""
    combined = negative + 2.5 * (positive - negative)
    return combined * positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("changes", [{}, {"key_bias": "none"}, {"rope": "phase_aligned"}, {"attention": "torch"}])
def test_packed_guidance_equals_two_single_passes(plus, zero_cond_t, changes):
    pipe = plus.make(zero_cond_t=zero_cond_t)
    adapter, state = plus.prepare(pipe, (144, 112), **GUIDED)
    alone = [
        plus.prepare(pipe, (144, 112), prompt=prompt, true_cfg_scale=1.0)[1]
        for prompt in ("make it red", "blue and dark")
    ]
    assert len({each.text_tokens for each in alone}) == 2  # branches of one length would show nothing
    for layout in (mixed_layout(state.grid), MixedLayout.all_coarse(state.grid), MixedLayout.all_fine(state.grid)):
        packed, *halves = (velocity(adapter, pipe, each, layout, SpecEditConfig(**changes)) for each in (state, *alone))
        close(packed, guided(*halves), 1e-5)


def test_packed_guidance_is_one_forward_without_padding(edit, monkeypatch):
    pipe = edit.make()
    adapter, state = edit.prepare(pipe, **GUIDED)
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    layout = mixed_layout(state.grid)
    velocity(adapter, pipe, state, layout, SpecEditConfig())
    beside = state.beside(layout)
    texts = [prompt.embeds.shape[1] for prompt in state.conditioning.prompts(2)]
    assert len(seen) == 1
    assert seen[0]["hidden_states"].shape[:2] == (1, 2 * (layout.tokens + beside.tokens))
    assert seen[0]["encoder_hidden_states"].shape[:2] == (1, sum(texts))
    packing = seen[0]["attention_kwargs"]["specedit"].packing
    ends = [0, texts[0] + layout.tokens + beside.tokens, sum(texts) + 2 * (layout.tokens + beside.tokens)]
    assert packing.cu_seqlens.tolist() == ends and packing.longest == max(ends[1], ends[2] - ends[1])
    rows = torch.cat([packing.text, packing.image]).sort().values
    assert torch.equal(rows, torch.arange(ends[-1]))  # every row of the joint sequence, once


def test_guidance_is_rescaled_to_the_norm_under_the_prompt(edit):
    pipe, config = edit.make(), SpecEditConfig()
    adapter, state = edit.prepare(pipe, **GUIDED)
    layout = mixed_layout(state.grid)
    got = velocity(adapter, pipe, state, layout, config)
    halves = []
    for prompt in ("make it red", "blue and dark"):
        _, alone = edit.prepare(pipe, prompt=prompt, true_cfg_scale=1.0)
        halves.append(velocity(adapter, pipe, alone, layout, config))
    close(got, guided(*halves))
    close(got.norm(dim=-1), halves[0].norm(dim=-1))


@pytest.mark.parametrize(
    "changes",
    [dict(true_cfg_scale=1.0, negative_prompt="blue"), dict(true_cfg_scale=4.0)],
    ids=["scale 1", "no prompt"],
)
def test_without_guidance_a_step_costs_one_half(edit, changes):
    pipe = specedit.install(edit.make(), **QUICK)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    edit.run(pipe, **changes)
    half = specedit.report(pipe)
    assert len(calls) == 2 + 4 and all(len(call["hidden_states"]) == 1 for call in calls)
    edit.run(pipe, negative_prompt="blue", true_cfg_scale=2.0)
    both = specedit.report(pipe)
    stages = [{s.name: s for s in report.stages if s.steps} for report in (half, both)]
    texts = [len("make it red"), len("blue")]
    for name, one in stages[0].items():
        if name == "mixed":  # the draft found another region
            continue
        read = {"draft": 4, "coarse": 16, "full": 64}[name]
        other = transformer_flops(pipe.transformer.config, one.tokens - texts[0] + texts[1], None, read)
        assert stages[1][name].flops == pytest.approx(one.flops + one.steps * other)


def test_prompts_of_different_length_run_without_their_padding(edit, picture):
    pipe = edit.make()
    changes = dict(image=[picture(), picture(seed=1)], prompt=["red", "make all of it blue"])
    adapter, state = edit.prepare(pipe, **changes)
    assert state.conditioning.positive.lengths[0] < state.conditioning.positive.lengths[1]
    for config in (SpecEditConfig(), SpecEditConfig(attention="stock")):
        layout = mixed_layout(state.grid)
        both = velocity(adapter, pipe, state, layout, config)
        for row in (0, 1):
            _, alone = edit.prepare(pipe, image=changes["image"][row], prompt=changes["prompt"][row])
            alone.noise = alone.noise.repeat(2, 1, 1)  # only its batch counts here
            alone.reference = alone.reference.repeat(2, 1, 1)
            alone.conditioning.prompt_embeds = alone.conditioning.prompt_embeds.repeat(2, 1, 1)
            close(velocity(adapter, pipe, alone, layout, config)[row], both[row])


def test_padding_counts_where_it_is_computed():
    prompt = QwenPrompt(torch.zeros(2, 10, 4), mask=None, lengths=[4, 10])
    assert text_counts(prompt, None, "auto") == dict(text_tokens=7.0, negative_text_tokens=None)
    assert text_counts(prompt, prompt, "stock") == dict(text_tokens=10, negative_text_tokens=10)

"""Callbacks, progress bars and interrupts."""

import copy
import io

import pytest
import torch

import specedit
from tests.sampler.common import CORNER, QUICK, count_calls


def test_callbacks_hear_of_every_step(pipe, edit):
    specedit.install(pipe, **QUICK, uniform_stride=0)
    expected = edit(pipe)
    heard = []

    def callback(its_pipe, step, timestep, kwargs):
        assert its_pipe is pipe and pipe.current_timestep is timestep
        heard.append((step, timestep, {name: value.shape for name, value in kwargs.items()}))
        return kwargs

    inputs = ["latents", "prompt_embeds"]
    out = edit(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert torch.equal(out, expected)  # looking changes nothing
    assert [step for step, _, _ in heard] == list(range(6))
    times = [timestep for _, timestep, _ in heard]
    assert all(isinstance(t, torch.Tensor) and t.ndim == 0 for t in times)
    starts = [s.sigma_start for s in specedit.report(pipe).stages if s.name in ("coarse", "mixed", "full")]
    assert [times[i].item() for i in (0, 2, 4)] == pytest.approx([1000 * s for s in starts])
    assert times[0] == 1000 and times[1] < times[0] and times[5] < times[4]
    shapes = {"latents": (1, 64, 16), "prompt_embeds": (1, 16, 32)}
    assert all(shown == shapes for _, _, shown in heard)
    assert pipe.current_timestep is None


def test_the_progress_bar_is_the_pipelines_own(pipe, edit):
    specedit.install(pipe, **QUICK)
    for disable in (False, True):
        shown = io.StringIO()
        pipe.set_progress_bar_config(disable=disable, desc="mine", file=shown)
        edit(pipe)
        steps = specedit.report(pipe).nfe + specedit.report(pipe).draft_steps
        assert ("mine" in shown.getvalue() and f"{steps}/{steps}" in shown.getvalue()) is not disable


def test_callback_timesteps_are_the_stock_pipelines(pipe, edit):
    heard = []
    note = lambda pipe, step, timestep, kwargs: heard.append((step, timestep)) or {}  # noqa: E731
    edit(pipe, num_inference_steps=3, callback_on_step_end=note)
    specedit.install(pipe, steps=(0, 0, 3))
    edit(pipe, callback_on_step_end=note)
    for (i, stock), (k, ours) in zip(heard[:3], heard[3:], strict=True):
        assert i == k and ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock)


def test_hooks_on_the_transformer_read_the_timestep_of_their_own_step(pipe, edit):
    """Of the draft too: diffusers' caches and adapters that act on some steps only read it in the middle of a step."""
    shown, given = [], []

    def hook(module, args, kwargs):
        shown.append(pipe.current_timestep.item())
        given.append(kwargs["timestep"][0].item() * 1000)

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        specedit.install(pipe, **QUICK)
        edit(pipe, edit_mask=CORNER)
        edit(pipe)
    finally:
        handle.remove()
    assert len(shown) == 6 + specedit.report(pipe).draft_steps + 6 and shown == pytest.approx(given)


@pytest.mark.parametrize("way", ["returned", "in place"])
@pytest.mark.parametrize("step", [1, 3, 5], ids=["coarse", "mixed", "full"])
def test_latents_that_a_callback_replaces_take_effect(pipe, edit, step, way):
    specedit.install(pipe, **QUICK)
    plain = edit(pipe, edit_mask=CORNER)

    def callback(pipe, index, timestep, kwargs):
        if index != step:
            return {}
        if way == "in place":
            kwargs["latents"].fill_(0.25)
            return {}
        return {"latents": torch.full_like(kwargs["latents"], 0.25)}

    out = edit(pipe, edit_mask=CORNER, callback_on_step_end=callback)
    assert (out - plain).abs().max() > 1e-2
    if step == 5:
        assert (out == 0.25).all()


def test_a_copy_of_the_latents_is_no_change(pipe, edit):
    """Nor does it round them: a pipeline in half precision shows its callback rounded ones."""
    pipe = copy.deepcopy(pipe).to(dtype=torch.bfloat16)  # its modules are everybody's
    specedit.install(pipe, **QUICK, uniform_stride=0)
    plain = edit(pipe, edit_mask=CORNER)
    copied = lambda pipe, index, timestep, kwargs: {"latents": kwargs["latents"].clone()}  # noqa: E731
    assert torch.equal(edit(pipe, edit_mask=CORNER, callback_on_step_end=copied), plain)
    rounded = lambda pipe, index, timestep, kwargs: {"latents": kwargs["latents"] + 1}  # noqa: E731
    assert not torch.equal(edit(pipe, edit_mask=CORNER, callback_on_step_end=rounded), plain)


def test_a_callback_may_replace_the_prompt(pipe, edit):
    specedit.install(pipe, **QUICK)
    plain = edit(pipe, edit_mask=CORNER)
    zeros = lambda pipe, index, timestep, kwargs: {"prompt_embeds": torch.zeros(1, 16, 32)}  # noqa: E731
    assert (edit(pipe, edit_mask=CORNER, callback_on_step_end=zeros) - plain).abs().max() > 1e-4


def test_latents_of_the_wrong_shape_from_a_callback(pipe, edit):
    specedit.install(pipe, **QUICK)
    wrong = lambda *_: {"latents": torch.zeros(1, 3, 16)}  # noqa: E731
    with pytest.raises(ValueError, match=r"expected latents of shape \(1, 64, 16\), got \(1, 3, 16\)"):
        edit(pipe, callback_on_step_end=wrong)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        edit(pipe, callback_on_step_end=wrong, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("last", [0, 1, 2, 5])
def test_interrupt_returns_the_latents_as_they_are(pipe, edit, last, restore):
    specedit.install(pipe, **QUICK, restore=restore)
    calls, seen = count_calls(pipe), []

    def callback(pipe, index, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        pipe._interrupt = index == last
        return {}

    out = edit(pipe, edit_mask=CORNER, callback_on_step_end=callback)
    assert len(seen) == last + 1 == sum(calls.values())
    if last < 5:
        assert torch.equal(out, seen[-1])
    report = specedit.report(pipe)
    assert report.nfe == last + 1 == sum(stage.steps for stage in report.stages)
    whole = edit(pipe, edit_mask=CORNER)  # the next call starts anew
    assert specedit.report(pipe).nfe == 6
    if last == 5:
        assert torch.equal(out, whole)


def test_an_interrupt_during_the_draft(pipe, edit):
    specedit.install(pipe, **QUICK)
    calls = []

    def stop(module, args, kwargs):
        calls.append(1)
        pipe._interrupt = True

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    out = edit(pipe)
    handle.remove()
    done = specedit.report(pipe)
    assert len(calls) == 1 and out.shape == (1, 64, 16) and done.nfe == 0 and done.draft_steps == 1
    (stage,) = (s for s in done.stages if s.steps)
    edit(pipe)
    assert stage.name == "draft" and 2 * stage.flops == next(
        s.flops for s in specedit.report(pipe).stages if s.name == "draft"
    )

"""Calls of QwenImage21Pipeline: references, sizes, LoRA, callbacks, errors, and what runs stock."""

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.api.installing import is_active
from specedit.models import qwen21
from tests.models.whole_calls import (
    CORNER,
    QUICK,
    assert_a_lora_acts_as_in_stock,
    assert_images_come_as_stock_gives_them,
    close,
    save_lora,
)

if qwen21.QwenImage21 is None:
    pytest.skip("this diffusers has no Qwen-Image-2.1", allow_module_level=True)

from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

GUIDED = dict(negative_prompt="blue", true_cfg_scale=2.5)


@pytest.fixture
def modes():
    """A list of what every call of a pipeline's transformer does with its cache, and over how many image tokens."""
    handles = []

    def watch(pipe):
        seen = []
        handles.append(
            pipe.transformer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((kwargs["kv_cache_mode"], kwargs["hidden_states"].shape[1])),
                with_kwargs=True,
            )
        )
        return seen

    yield watch
    for handle in handles:
        handle.remove()


# ------------------------------------------------------------------------------------------------- text and references


def test_text_and_references_are_computed_once_a_run(family, modes):
    pipe = specedit.install(family.make(), steps=(2, 2, 2), draft_steps=3)
    seen = modes(pipe)
    family.run(pipe)
    assert [mode for mode, _ in seen] == ["extract"] + ["cached"] * 9
    assert seen[0][1] == 64 + 4 and seen[1][1] == 4 and seen[-1][1] == 64  # the draft has 2 x 2 tokens
    _, state = family.prepare(family.make())
    # Keys and values of the prefix, 2 heads of 16, in 2 blocks, float32.
    assert specedit.report(pipe).cache_bytes == 2 * (64 + state.text_tokens) * 32 * 4 * 2
    seen.clear()
    family.run(pipe, edit_mask=CORNER, **GUIDED)
    assert [mode for mode, _ in seen].count("extract") == 2


def test_without_its_cache_every_step_computes_them_and_nothing_changes(family, modes):
    pipe = specedit.install(family.make(), restore="reference", **QUICK)
    kept, report = family.run(pipe), specedit.report(pipe)
    seen = modes(pipe)
    assert torch.equal(family.run(pipe, use_kv_cache=False), kept)
    assert [mode for mode, _ in seen] == ["extract", "cached"] * 6
    other = specedit.report(pipe)
    assert other.cache_bytes == 0 < report.cache_bytes
    assert other.flops > report.flops and other.flops_stock > report.flops_stock
    stock = family.run(family.make(), num_inference_steps=2, use_kv_cache=False)
    close(family.run(specedit.install(family.make(), steps=(0, 0, 2)), use_kv_cache=False), stock)


def several(picture, number):
    """A call with references of several sizes, for prompts of one length or of two, and under guidance."""
    images, prompt = [picture(144, 112), picture(64, 128, 1), picture(128, 96, 2)], ["red", "make it large"]
    negative = dict(GUIDED, negative_prompt=["x", "much longer"])
    return (
        dict(image=images[1:]), dict(image=images, prompt=prompt, num_images_per_prompt=2),
        dict(image=images[:2], prompt=prompt, **negative),
    )[number]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the output is")
@pytest.mark.parametrize(("number", "attention"), [(0, "auto"), (1, "stock"), (2, "auto"), (2, "torch")])
def test_several_references_equal_stock(family, picture, number, attention):
    call = several(picture, number)
    stock = family.run(family.make(), num_inference_steps=2, **call)
    pipe = specedit.install(family.make(), steps=(0, 0, 2), attention=attention)
    close(family.run(pipe, **call), stock)
    specedit.install(pipe, restore="reference", attention=attention, **QUICK)
    assert family.run(pipe, **call).isfinite().all()


def test_the_last_reference_is_edited(family, picture):
    images = [picture(128, 128, 3), picture(128, 128, 4)]
    _, state = family.prepare(family.make(), image=images)
    _, alone = family.prepare(family.make(), image=images[-1])
    assert state.edited == 1 and torch.equal(state.aligned, alone.reference)


def test_kept_pixels_are_the_pictures_own_with_their_alpha(family, picture):
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    for kind in ("pil", "np"):
        pipe = specedit.install(family.make(), keep_pixels=True, **QUICK)
        out = family.run(pipe, image=image, edit_mask=CORNER, output_type=kind)[0]
        own = np.asarray(image, dtype=np.float32) / (255 if kind == "np" else 1)
        np.testing.assert_array_equal(np.asarray(out, dtype=np.float32)[64:, 64:], own[64:, 64:])
        assert np.asarray(out).shape == (128, 128, 4)


@pytest.mark.slow
def test_a_figure_of_a_picture_with_alpha(family, tmp_path):
    pytest.importorskip("matplotlib")
    pipe = specedit.install(family.make(), **QUICK)
    family.run(pipe, output_type="pil")
    specedit.report(pipe).save_figure(tmp_path / "figure.png")


@pytest.mark.parametrize("selector", ["edges", "variance", "uniform"])
def test_other_selectors(family, selector):
    pipe = specedit.install(family.make(), selector=selector, **QUICK)
    assert family.run(pipe).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["steps", "ralu", "fresco", "bottleneck", "speed"])
def test_methods_that_change_resolution(family, method):
    pipe = specedit.install(family.make(), method=method)
    assert family.run(pipe, num_inference_steps=8).isfinite().all()


def test_areas_weigh_coarse_keys_beside_a_fine_reference(family):
    """In coarse stages and drafts too: their tokens stand for several of the reference's."""
    runs = {
        bias: family.run(specedit.install(family.make(), steps=(3, 0, 0), draft_steps=0, key_bias=bias))
        for bias in ("area", "none")
    }
    assert (runs["area"] - runs["none"]).abs().max() > 1e-3


@pytest.mark.parametrize("locked", ["coarse", "cached"])
def test_padding_of_a_target_reaches_nothing(family, locked):
    """The model takes multiples of four tokens, and a mixed sequence has any number."""
    config = dict(steps=(1, 3, 1), draft_steps=2, uniform_stride=0, locked=locked)
    pipe, padded = specedit.install(family.make(), **config), []
    expected = family.run(pipe, edit_mask=CORNER)

    def disturb(module, args, kwargs):
        states = kwargs["hidden_states"]
        zeros = (states == 0).all(-1)
        padded.append(int(zeros.sum()))
        return args, kwargs | {"hidden_states": torch.where(zeros[..., None], 9.0, states)}

    handle = pipe.transformer.register_forward_pre_hook(disturb, with_kwargs=True)
    close(family.run(pipe, edit_mask=CORNER), expected)
    handle.remove()
    assert any(padded)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_without_a_size_the_output_takes_the_last_references(family, picture):
    call = dict(image=[picture(128, 128), picture(90, 140)], height=None, width=None, output_type="np")
    stock = family.run(family.make(), num_inference_steps=1, **call)
    ours = family.run(specedit.install(family.make(), steps=(0, 0, 1)), **call)
    assert ours.shape == stock.shape == (1, 96, 160, 4)
    np.testing.assert_allclose(ours, stock, atol=2e-4)


@pytest.mark.parametrize("size", [(300, 200), (1024, 1024), (640, 1500)])
def test_size_for_crops_nothing(family, size):
    pipe, image = family.make(), Image.new("RGB", size)
    given = specedit.size_for(pipe, [Image.new("RGB", (50, 50)), image])
    assert given["output_resolution"] == 1024 and given == specedit.size_for(pipe, image)
    taken = qwen21.edit.taken_size(image, 1024)
    assert (given["height"], given["width"]) == taken and not any(side % 32 for side in taken)


@pytest.mark.slow
def test_images_come_as_stock_gives_them(family):
    assert_images_come_as_stock_gives_them(family)


def test_arrays_are_pictures_too(family, picture):
    expected = family.run(specedit.install(family.make(), **QUICK))
    assert torch.equal(family.run(specedit.install(family.make(), **QUICK), image=np.asarray(picture())), expected)


def test_given_latents(family):
    pipe, latents = family.make(), torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(3))
    stock = family.run(pipe, num_inference_steps=2, latents=latents)
    specedit.install(pipe, steps=(0, 0, 2))
    close(family.run(pipe, latents=latents), stock)
    with pytest.raises(ValueError, match=r"latents: expected shape \(1, 64, 4\), got \(1, 16, 16\)"):
        family.run(pipe, latents=torch.randn(1, 16, 16))


# --------------------------------------------------------------------------------------- LoRA, callbacks, dtypes, modes


@pytest.mark.slow
def test_lora_by_the_pipelines_own_loader(family, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["to_q", "to_k", "to_v", "to_out.0", "gate_layer", "img_in", "txt_in.in_layer"]
    assert_a_lora_acts_as_in_stock(family, save_lora(peft, family, names, tmp_path))


def test_callbacks_and_interrupts(family):
    pipe, seen = specedit.install(family.make(), **QUICK), []

    def end(pipe, i, t, tensors):
        seen.append((i, tensors["latents"].shape))
        pipe._interrupt = i == 2
        return {}

    family.run(pipe, callback_on_step_end=end)
    assert seen == [(i, (1, 64, 4)) for i in range(3)] and specedit.report(pipe).nfe == 3


@pytest.mark.parametrize("in_place", [False, True])
def test_a_prompt_that_a_callback_changes_is_computed_anew(family, modes, in_place):
    pipe = specedit.install(family.make(), steps=(0, 0, 3))
    expected = family.run(pipe)
    seen = modes(pipe)

    def end(pipe, i, t, tensors):
        if i != 0:
            return {}
        embeds = tensors["prompt_embeds"]
        return {"prompt_embeds": embeds.mul_(-1) if in_place else -embeds}

    changed = family.run(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [mode for mode, _ in seen] == ["extract", "cached"] * 2 + ["cached"]
    assert (changed - expected).abs().max() > 1e-3


def test_bfloat16(family):
    pipe = family.make()
    for part in ("transformer", "vae", "text_encoder"):
        getattr(pipe, part).to(torch.bfloat16)
    specedit.install(pipe, restore="reference", **QUICK)
    out = family.run(pipe)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.slow
def test_the_flex_processor_keeps_its_mask_of_blocks(family):
    expected = family.run(specedit.install(family.make(), **QUICK))
    pipe = family.make()
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    close(family.run(specedit.install(pipe, **QUICK)), expected)
    specedit.uninstall(pipe)
    assert all(type(b.attn.processor) is QwenImage21FlexAttnProcessor for b in pipe.transformer.transformer_blocks)


# ---------------------------------------------------------------------------------------------- what raises, runs stock


@pytest.mark.parametrize(
    ("changes", "reason"),
    [(dict(image=None), "there is no image to edit"), (dict(sigmas=[1.0, 0.5]), "sigmas were given"),
     (dict(height=32), "a picture with fewer than 4 tokens a side, 64 px")],
)  # fmt: skip
def test_what_runs_stock(family, changes, reason):
    pipe = specedit.install(family.make(), **QUICK)
    with pytest.warns(UserWarning, match=f"SpecEdit runs the stock pipeline: {reason}"):
        got = family.run(pipe, num_inference_steps=2, **changes)
    assert torch.equal(got, family.run(family.make(), num_inference_steps=2, **changes))


def test_a_transformer_whose_prefix_follows_the_timestep_runs_stock(family_of):
    family = family_of(causal_condition=False)
    pipe = specedit.install(family.make(), **QUICK)
    with pytest.warns(UserWarning, match="its transformer's text and references follow the timestep"):
        got = family.run(pipe, num_inference_steps=2)
    assert torch.equal(got, family.run(family.make(), num_inference_steps=2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [(dict(image=np.zeros((64, 64, 3), np.float32)), TypeError, "image: expected a uint8 array .* got float32"),
     (dict(image=torch.zeros(3, 64, 64)), TypeError, "image: expected a PIL image, .* got Tensor"),
     (dict(image=[]), ValueError, "image: expected at least one picture, got an empty list"),
     (dict(image=[[Image.new("RGB", (64, 64))]]), ValueError, "image: expected one flat list of pictures"),
     (dict(image=Image.new("RGB", (4000, 1))), ValueError, "image: expected sides less unequal, got 4000 x 1"),
     (dict(width=16), ValueError, "width: expected at least 32 px, got 16"),
     (dict(prompt=None, prompt_embeds=torch.zeros(1, 8, 16)), ValueError, "prompt_embeds: expected a prompt as text"),
     (dict(GUIDED, negative_prompt=["a", "b"]), ValueError, "negative_prompt: expected 1, one for each prompt, got 2")],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_any_work(family, count_calls, changes, error, message):
    pipe = specedit.install(family.make(), **QUICK)
    calls = count_calls(pipe.transformer, pipe.text_encoder)
    with pytest.raises(error, match=message):
        family.run(pipe, **changes)
    assert not calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(rope="phase_aligned"), "rope: expected 'scaled' for qwen-image-2.1, which rotates keys at one scale"),
     (dict(reference_refresh=2), "reference_refresh: .* qwen-image-2.1, which computes text and references once a run"),
     (dict(draft_condition="small"), "draft_condition: expected 'full' for qwen-image-2.1, which computes text and"),
     (dict(reference_keep=0.15), "reference_keep: expected None for qwen-image-2.1")],
)  # fmt: skip
def test_switches_that_make_no_sense_are_refused_when_they_are_installed(family, changes, message):
    pipe = specedit.install(family.make(), **QUICK)
    expected = family.run(pipe)
    with pytest.raises(ValueError, match=message):
        specedit.install(pipe, **changes)
    assert torch.equal(family.run(pipe), expected)  # as it was installed
    specedit.uninstall(pipe)
    with pytest.raises(ValueError, match=message):
        specedit.install(pipe, **changes)
    assert not is_active(pipe)


def test_a_backend_without_masks_is_refused_before_any_work(family, count_calls):
    """Also where no stage is mixed: coarse tokens beside fine references have a bias, and padding is hidden."""
    pipe = specedit.install(family.make(), attention="stock", steps=(2, 0, 2), key_bias="none")
    calls = count_calls(pipe.transformer)
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = "_native_npu"
    with pytest.raises(ValueError, match="attention: expected an attention backend that takes a mask"):
        family.run(pipe)
    assert not calls

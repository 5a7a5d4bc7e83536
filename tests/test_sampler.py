"""The whole loop: against loops written out here, and what a caller sees of it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import specedit
from specedit import SpecEditConfig, presets
from specedit.grid import TokenGrid
from specedit.models.flux import FluxKontext
from specedit.restore import feather

FULL = np.ones((8, 8), dtype=bool)
CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
CENTRE = np.zeros((128, 128), dtype=bool)
CENTRE[40:90, 40:120] = True
QUICK = dict(steps=(2, 2, 2), draft_steps=2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def count_calls(pipe):
    """A counter of transformer calls by target and reference tokens."""
    calls = Counter()

    def count(module, args, kwargs):
        calls[kwargs["hidden_states"].shape[1]] += 1

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    return calls


# --------------------------------------------------------------------------------------- against loops written out


def shifted(tokens, start, end, steps):
    """Sigmas of FLUX: uniform times from `start` to `end` under sigma = a t / (1 + (a - 1) t), a = exp(mu)."""
    a = np.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    t = np.linspace(*(s / (a - (a - 1) * s) for s in (start, end)), steps + 1)
    return a * t / (1 + (a - 1) * t)


def euler(pipe, latents, reference, sigmas, prompt="make it red"):
    """Plain Euler steps of latents (1, 4, h, w) beside a reference of the same size, through the stock transformer."""
    _, _, h, w = latents.shape
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, None, max_sequence_length=16)
    ids = pipe._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    tokens, beside = (pipe._pack_latents(x, 1, 4, h, w) for x in (latents, reference))
    for sigma, following in pairwise(sigmas):
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=torch.cat([tokens, beside], 1), timestep=torch.tensor([sigma], dtype=torch.float32),
                guidance=torch.tensor([3.5]), pooled_projections=pooled, encoder_hidden_states=embeds,
                txt_ids=text_ids, img_ids=torch.cat([ids, reference_ids]), return_dict=False,
            )[0][:, : tokens.shape[1]]  # fmt: skip
        tokens = tokens + (following - sigma) * velocity
    return pipe._unpack_latents(tokens, 8 * h, 8 * w, 8)


@pytest.fixture
def start(pipe, picture):
    """The call's noise and the reference's latents, (1, 4, 16, 16)."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return noise, pipe._encode_vae_image(pixels, None)


def unpacked(pipe, tokens):
    return pipe._unpack_latents(tokens, 128, 128, 8)


@pytest.mark.parametrize("size", [(128, 128), (144, 176)])
def test_full_steps_alone_are_the_stock_pipeline(pipe, edit, size):
    stock = edit(pipe, size, num_inference_steps=4)
    specedit.install(pipe, steps=(0, 0, 4))
    close(edit(pipe, size), stock)


def test_full_steps_alone_are_the_stock_pipeline_under_true_cfg(pipe, edit):
    guided = dict(negative_prompt="dull", true_cfg_scale=3.0)
    stock = edit(pipe, num_inference_steps=3, **guided)
    assert (stock - edit(pipe, num_inference_steps=3)).abs().max() > 1e-3
    specedit.install(pipe, steps=(0, 0, 3))
    close(edit(pipe, **guided), stock)


def test_everything_expanded_is_plain_full_resolution(pipe, edit, start):
    noise, reference = start
    middle = euler(pipe, noise, reference, shifted(64, 1.0, 0.4, 3))
    expected = euler(pipe, middle, reference, shifted(64, 0.4, 0.0, 2))
    specedit.install(pipe, steps=(0, 3, 2), boundaries=(0.7, 0.4))
    calls = count_calls(pipe)
    close(unpacked(pipe, edit(pipe, edit_mask=FULL)), expected)
    assert calls == {128: 5}


def test_coarse_then_full_resolution(pipe, edit, start):
    noise, reference = start
    # Half the size: white noise is the sum coefficient of each 2 x 2, the reference its mean.
    z = euler(pipe, F.avg_pool2d(noise, 2) * 2, F.avg_pool2d(reference, 2), shifted(16, 1.0, 0.6, 2))
    # Each pixel becomes (z ± s n1 ± s n2 ± s n3) / (1 + s), with the detail of the noise that the sum left out.
    up = lambda x: F.interpolate(x, scale_factor=2, mode="nearest")  # noqa: E731
    detail = noise - up(F.avg_pool2d(noise, 2))  # (± n1 ± n2 ± n3) / 2
    state = (up(z) + 0.6 * 2 * detail) / 1.6
    expected = euler(pipe, state, reference, shifted(64, 1.2 / 1.6, 0.0, 3))
    for steps in ((2, 0, 3), (2, 3, 0)):
        specedit.install(pipe, steps=steps, boundaries=(0.6, 0.3))
        close(unpacked(pipe, edit(pipe, edit_mask=FULL)), expected)


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_a_sequence_with_nothing_locked_is_stock_attention(pipe, edit, attention):
    specedit.install(pipe, steps=(1, 2, 1), attention="stock")
    stock = edit(pipe, edit_mask=FULL)
    specedit.install(pipe, steps=(1, 2, 1), attention=attention)
    close(edit(pipe, edit_mask=FULL), stock)


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("key_bias", ["area", "none"])
def test_attention_stock_and_torch_agree(pipe, edit, key_bias, restore):
    results = []
    for attention in ("stock", "torch", "auto"):
        specedit.install(pipe, **QUICK, key_bias=key_bias, restore=restore, attention=attention)
        results.append(edit(pipe, edit_mask=CORNER))
    close(results[0], results[1])
    close(results[1], results[2])


def test_a_perfect_model_restores_what_is_locked(pipe, edit, start, monkeypatch):
    # A velocity that always points to the reference, at every token's own resolution, must end at the reference.
    def velocity(self, pipe, state, tokens, sigma, rows, layout, reference, reference_layout, config):
        return (tokens - layout.from_full_grid(state.aligned[rows])) / sigma

    monkeypatch.setattr(FluxKontext, "velocity", velocity)
    _, reference = start
    for restore in ("full", "reference"):
        specedit.install(pipe, steps=(2, 2, 1), restore=restore)
        torch.testing.assert_close(unpacked(pipe, edit(pipe, edit_mask=CENTRE)), reference, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ counts of calls


@pytest.mark.parametrize("preset", presets)
def test_transformer_calls_are_nfe_plus_draft(pipe, edit, preset):
    config = presets[preset]
    specedit.install(pipe, preset)
    calls = count_calls(pipe)
    edit(pipe)
    assert sum(calls.values()) == config.nfe + config.draft_steps
    report = specedit.report(pipe)
    assert (report.nfe, report.draft_steps) == (config.nfe, config.draft_steps)
    assert sum(stage.steps for stage in report.stages) == config.nfe + config.draft_steps


def test_every_stage_has_its_tokens(pipe, edit):
    specedit.install(pipe, steps=(2, 3, 4), draft_steps=5, uniform_stride=0)
    calls = count_calls(pipe)
    edit(pipe)
    assert calls[2 * 4] == 5 and calls[2 * 16] >= 2 and calls[2 * 64] >= 4
    report = specedit.report(pipe)
    assert [s.name for s in report.stages] == ["encode", "draft", "verify", "coarse", "mixed", "full", "decode"]
    stages = {stage.name: stage for stage in report.stages}
    assert (stages["draft"].tokens, stages["coarse"].tokens, stages["full"].tokens) == (24, 48, 144)  # with the text
    calls.clear()
    edit(pipe, edit_mask=CORNER)  # four of the sixteen cells; no draft
    assert calls == {2 * 16: 2, 2 * (12 + 16): 3, 2 * 64: 4}
    report = specedit.report(pipe)
    assert report.draft_steps == 0 and report.edit_fraction == report.expand_fraction == 0.25


def test_reference_restore_never_runs_at_full_resolution(pipe, edit):
    specedit.install(pipe, steps=(2, 3, 4), restore="reference", uniform_stride=0)
    calls = count_calls(pipe)
    edit(pipe, edit_mask=CORNER)
    assert calls == {2 * 16: 2, 2 * (12 + 16): 7}


def test_uniform_coverage_is_expanded_beside_the_edit(pipe, edit):
    specedit.install(pipe, steps=(0, 1, 0), uniform_stride=3)
    calls = count_calls(pipe)
    edit(pipe, edit_mask=CORNER)  # cells 00, 01, 10, 11 and uniformly 00, 03, 30, 33
    assert calls == {2 * (16 + 3 * 7): 1}
    report = specedit.report(pipe)
    assert report.edit_mask.sum() == 4 and report.expand_mask.sum() == 7


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_num_inference_steps_rescales(pipe, edit, n):
    specedit.install(pipe, "turbo")
    calls = count_calls(pipe)
    edit(pipe, num_inference_steps=n, edit_mask=CORNER)
    assert sum(calls.values()) == n == specedit.report(pipe).nfe == pipe.num_timesteps


def test_num_inference_steps_must_be_a_positive_integer(pipe, edit):
    specedit.install(pipe, "turbo")
    for value, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="num_inference_steps: expected an integer of at least 1, got"):
            edit(pipe, num_inference_steps=value)


def test_true_cfg_runs_two_branches(pipe, edit):
    specedit.install(pipe, **QUICK)
    calls = count_calls(pipe)
    plain = edit(pipe)
    guided = edit(pipe, negative_prompt="dull", true_cfg_scale=3.0)
    assert sum(calls.values()) == 8 + 16
    assert (guided - plain).abs().max() > 1e-3
    flops = {stage.name: stage.flops for stage in specedit.report(pipe).stages}
    edit(pipe)
    halves = {stage.name: stage.flops for stage in specedit.report(pipe).stages}
    assert flops["coarse"] == 2 * halves["coarse"] > 0


# ---------------------------------------------------------------------------------------------- batches and sizes


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture, restore):
    specedit.install(pipe, **QUICK, restore=restore)
    pictures, prompts, masks = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"], [CORNER, CENTRE]
    both = edit(pipe, image=pictures, prompt=prompts, edit_mask=masks, generator=generators(3, 4))
    assert specedit.report(pipe).edit_mask.shape == (2, 4, 4)
    for i in range(2):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], edit_mask=masks[i], generator=generators(3, 4)[i])
        close(both[i], one[0])


def test_a_batch_with_drafts_of_its_own_is_two_single_runs(pipe, edit, picture):
    specedit.install(pipe, **QUICK, selector="variance", dilation=0)
    pictures, prompts = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"]
    both = edit(pipe, image=pictures, prompt=prompts, generator=generators(3, 4))
    masks = specedit.report(pipe).edit_mask
    assert not torch.equal(masks[0], masks[1])
    for i in range(2):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], generator=generators(3, 4)[i])
        assert torch.equal(specedit.report(pipe).edit_mask[0], masks[i])
        close(both[i], one[0])


def test_several_images_for_a_prompt(pipe, edit):
    specedit.install(pipe, **QUICK)
    both = edit(pipe, num_images_per_prompt=2, generator=generators(3, 4), edit_mask=CENTRE)
    assert both.shape == (2, 64, 16) and (both[0] - both[1]).abs().max() > 1e-2
    for i in range(2):
        close(both[i], edit(pipe, generator=generators(3, 4)[i], edit_mask=CENTRE)[0])


def test_the_generator_alone_decides(pipe, edit):
    specedit.install(pipe, **QUICK)
    torch.manual_seed(1)
    first = edit(pipe, seed=5)
    torch.manual_seed(2)
    assert torch.equal(edit(pipe, seed=5), first)
    assert not torch.equal(edit(pipe, seed=6), first)
    assert torch.equal(edit(pipe, generator=generators(5)), first)  # a list of one is that one


def test_the_wrong_number_of_generators(pipe, edit):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="list of generators of length 3"):
        edit(pipe, generator=generators(1, 2, 3))


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("couple_noise", [True, False])
@pytest.mark.parametrize("size", [(144, 176), (80, 272)])
def test_sizes_that_are_not_square_and_odd_in_tokens(pipe, edit, size, restore, couple_noise):
    specedit.install(pipe, **QUICK, restore=restore, couple_noise=couple_noise, selector="variance", dilation=0)
    grid = TokenGrid(size[0] // 16, size[1] // 16)
    latents = edit(pipe, size)
    assert latents.shape == (1, grid.tokens, 16) and latents.isfinite().all()
    report = specedit.report(pipe)
    assert report.score.shape == (1, *grid.shape) and report.edit_mask.shape == (1, *grid.coarse().shape)
    image = edit(pipe, size, output_type="pil")[0]
    assert image.size == (size[1], size[0])


@pytest.mark.parametrize("verify_at", ["full", "draft"])
@pytest.mark.parametrize("draft_scale", [2, 4])
def test_verification_on_an_odd_grid(pipe, edit, verify_at, draft_scale):
    specedit.install(pipe, **QUICK, verify_at=verify_at, draft_scale=draft_scale)
    assert edit(pipe, (144, 176)).isfinite().all()
    report = specedit.report(pipe)
    assert report.score.shape == (1, 9, 11) and report.edit_mask.shape == (1, 5, 6)
    assert report.score.isfinite().all() and report.score.max() > 0


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_a_reference_of_another_size(pipe, edit, picture, restore):
    specedit.install(pipe, **QUICK, restore=restore, selector="variance", dilation=0)
    calls = count_calls(pipe)
    latents = edit(pipe, (128, 128), image=picture(96, 160))
    assert latents.shape == (1, 64, 16) and latents.isfinite().all()
    assert calls[4 + 2 * 3] == 2  # draft: 2 x 2 tokens beside 2 x 3
    if restore == "full":
        assert calls[64 + 60] == 2


def test_reference_restore_returns_the_references_latents(pipe, edit, start):
    noise, reference = start
    specedit.install(pipe, **QUICK, restore="reference")
    latents = unpacked(pipe, edit(pipe, edit_mask=CORNER))
    cells = specedit.report(pipe).edit_mask
    assert cells.sum() == 4
    weight = feather(cells, 4, 1, (16, 16))[:, None].expand_as(latents)
    torch.testing.assert_close(latents[weight == 0], reference[weight == 0], rtol=1e-5, atol=1e-5)
    assert (latents - reference)[weight == 1].abs().min() > 0


def test_reference_restore_without_any_mask_is_full(pipe, edit):
    # The uniform selector finds no edit; locking everything would return the input.
    specedit.install(pipe, steps=(1, 2, 0), restore="full", selector="uniform", uniform_stride=1)
    full = edit(pipe)
    specedit.install(pipe, steps=(1, 2, 0), restore="reference", selector="uniform")
    close(edit(pipe), full)
    assert specedit.report(pipe).edit_fraction == 1


def test_a_draft_that_shows_no_change_is_not_believed(pipe, edit):
    specedit.install(pipe, **QUICK, restore="reference", threshold=4.0)
    edit(pipe)
    assert specedit.report(pipe).edit_fraction == 1
    specedit.install(pipe, **QUICK, restore="full", threshold=4.0)
    edit(pipe)
    assert specedit.report(pipe).edit_fraction == 0


def test_nearly_everything_edited_is_everything(pipe, edit):
    mask = np.ones((4, 4))
    mask[3, 3] = 0
    specedit.install(pipe, **QUICK)
    edit(pipe, edit_mask=mask)
    done = specedit.report(pipe)
    assert done.edit_fraction == 15 / 16 and done.expand_fraction == 1  # what was asked, and what was refined
    mask[2:, 3] = 0
    edit(pipe, edit_mask=mask)
    assert specedit.report(pipe).expand_fraction < 1


@pytest.mark.parametrize("masks", [("all", "some"), ("some", "all")])
def test_samples_that_reach_a_stage_at_different_levels_keep_their_own(pipe, edit, picture, masks):
    kinds = {"all": np.ones((128, 128)), "some": CORNER}
    masks = [kinds[m] for m in masks]
    specedit.install(pipe, **QUICK)
    pictures, prompts = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"]
    both = edit(pipe, image=pictures, prompt=prompts, edit_mask=masks, generator=generators(3, 4))
    for i in range(2):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], edit_mask=masks[i], generator=generators(3, 4)[i])
        close(both[i], one[0])


def test_a_stage_that_ends_above_where_its_layout_was_left(pipe, edit):
    specedit.install(pipe, steps=(1, 1, 1), boundaries=(0.5, 0.6), threshold=4.0, uniform_stride=0, draft_steps=1)
    assert torch.isfinite(edit(pipe)).all()


def test_keep_pixels_does_not_believe_a_draft_without_change_either(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True, threshold=4.0)
    image = np.asarray(edit(pipe, output_type="pil")[0])
    assert not np.array_equal(image, np.asarray(picture()))


def test_keep_pixels_keeps_even_the_little_that_a_large_mask_leaves(pipe, edit, picture):
    mask = np.ones((128, 128))
    mask[96:, 96:] = 0
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = np.asarray(edit(pipe, edit_mask=mask, output_type="pil")[0])
    assert np.array_equal(image[96:, 96:], np.asarray(picture())[96:, 96:])


# ------------------------------------------------------------------------------------- the call's other arguments


def test_latents_argument_replaces_the_noise(pipe, edit, start):
    noise, _ = start
    specedit.install(pipe, **QUICK, couple_noise=True)
    expected = edit(pipe)
    packed = pipe._pack_latents(noise, 1, 4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 16, 16, generator=generator)  # what the pipeline itself would have drawn
    assert torch.equal(edit(pipe, latents=packed, generator=generator), expected)
    other = edit(pipe, latents=-packed, generator=torch.Generator().manual_seed(0))
    assert (other - expected).abs().max() > 1e-2


def test_prompt_embeds(pipe, edit):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)
    close(edit(pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled), expected)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        edit(pipe, prompt=None)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_output_types(pipe, edit, kind):
    specedit.install(pipe, **QUICK)
    latents = unpacked(pipe, edit(pipe)) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    image = edit(pipe, output_type=kind)
    if kind == "pt":
        close(image, expected)
    else:
        expected = expected.permute(0, 2, 3, 1).numpy()
        if kind == "pil":
            assert [type(i) for i in image] == [Image.Image]
            image, expected = np.asarray(image[0], dtype=int)[None], (expected * 255).round().astype(int)
        assert image.shape == expected.shape and np.abs(image - expected).max() <= (1 if kind == "pil" else 1e-5)


def test_return_dict(pipe, picture):
    specedit.install(pipe, **QUICK)
    call = dict(
        prompt="a", height=128, width=128, max_area=128 * 128, _auto_resize=False, max_sequence_length=16,
        output_type="latent",
    )  # fmt: skip
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    plain = pipe(picture(), **call, generator=seeded(), return_dict=False)
    wrapped = pipe(picture(), **call, generator=seeded())
    assert type(plain) is tuple and len(plain) == 1
    assert type(wrapped).__name__ == "FluxPipelineOutput" and torch.equal(wrapped.images, plain[0])


@pytest.mark.parametrize("given", ["pil", "pt"])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_keep_pixels_is_exact_outside_the_edit(pipe, edit, picture, kind, given):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = picture()
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    if given == "pt":
        image = values = values * 0.7001 + 0.01  # not multiples of 1 / 255
    out = edit(pipe, image=image, edit_mask=CENTRE, output_type=kind)
    if kind == "pil":
        out = torch.from_numpy(np.array(out[0])).permute(2, 0, 1)[None]
        values = (values * 255).round().to(torch.uint8)
    elif kind == "np":
        out = torch.from_numpy(out).permute(0, 3, 1, 2)
    weight = feather(specedit.report(pipe).edit_mask, 32, 8, (128, 128))[:, None].expand_as(out)
    assert torch.equal(out[weight == 0], values[weight == 0]) and (weight == 0).any()
    assert (out[weight == 1] != values[weight == 1]).float().mean() > 0.9


def test_keep_pixels_of_another_size(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = picture(96, 160)
    out = np.asarray(edit(pipe, image=image, edit_mask=CORNER, output_type="pil")[0])
    resized = np.asarray(image.resize((128, 128), Image.Resampling.LANCZOS))
    assert np.array_equal(out[64:], resized[64:]) and np.array_equal(out[:, 64:], resized[:, 64:])


def test_keep_pixels_without_any_mask_returns_the_edit(pipe, edit, picture):
    specedit.install(pipe, steps=(1, 1, 1), selector="uniform", keep_pixels=True)
    out = edit(pipe, output_type="pt")
    specedit.install(pipe, steps=(1, 1, 1), selector="uniform", keep_pixels=False, uniform_stride=1)
    close(edit(pipe, output_type="pt"), out)


def test_joint_attention_kwargs_reach_the_transformer(pipe, edit, monkeypatch):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe, edit_mask=CORNER)
    scales = []

    def note(module, args, kwargs):
        scales.append(kwargs["joint_attention_kwargs"].get("scale"))

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    given = {"scale": 0.5}
    close(edit(pipe, edit_mask=CORNER, joint_attention_kwargs=given), expected)  # no LoRA is loaded
    assert scales == [0.5] * 6 and given == {"scale": 0.5}
    assert pipe.joint_attention_kwargs == {"scale": 0.5}


# ---------------------------------------------------------------------------------------- callbacks and interrupts


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


def test_callback_timesteps_are_the_stock_pipelines(pipe, edit):
    heard = []
    note = lambda pipe, step, timestep, kwargs: heard.append((step, timestep)) or {}  # noqa: E731
    edit(pipe, num_inference_steps=3, callback_on_step_end=note)
    specedit.install(pipe, steps=(0, 0, 3))
    edit(pipe, callback_on_step_end=note)
    for (i, stock), (k, ours) in zip(heard[:3], heard[3:], strict=True):
        assert i == k and ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock)


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
    assert len(calls) == 1 and out.shape == (1, 64, 16) and specedit.report(pipe).nfe == 0


def test_the_report_of_a_run(pipe, edit):
    specedit.install(pipe, "turbo")
    edit(pipe, output_type="pil")
    report = specedit.report(pipe)
    assert report.preset == "turbo" and report.config == SpecEditConfig.preset("turbo")
    assert report.source.size == report.edit.size == (128, 128)
    assert report.seconds > 0 and sum(stage.seconds for stage in report.stages) <= report.seconds
    assert report.flops == sum(stage.flops for stage in report.stages)
    width, tokens = 2 * 16, 2 * 64 + 16
    assert report.flops_stock == 50 * tokens * 2 * (24 * width**2 + 4 * width * tokens)
    assert (report.expand_mask | ~report.edit_mask).all()

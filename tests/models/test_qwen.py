"""The Qwen adapters: what the conformance tests leave open."""

import threading

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image

import specedit
from specedit import SpecEditConfig
from specedit.flops import transformer_flops
from specedit.grid import GridSet, LayoutSet, MixedLayout, TokenGrid
from specedit.models.qwen import QwenImageEdit, QwenImageEditPlus, nearest_shape
from specedit.sampler import restrict
from tests.models.conformance import Family, mixed_layout, trace

QUICK = dict(steps=(2, 1, 1), draft_steps=2)
GUIDED = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)


@pytest.fixture
def edit(make_qwen, picture):
    """QwenImageEditPipeline as a family."""

    def call(height, width):
        return dict(image=picture(height, width), prompt="make it red", height=height, width=width)

    return Family(QwenImageEdit, make_qwen, call)


@pytest.fixture
def plus(make_qwen, picture):
    """QwenImageEditPlusPipeline as a family, with two references of different shape; the second is the edited one."""

    def call(height, width):
        images = [picture(64, 128, seed=3), picture(height, width)]
        return dict(image=images, prompt="make it red", height=height, width=width)

    return Family(QwenImageEditPlus, lambda **options: make_qwen(QwenImageEditPlusPipeline, **options), call)


def velocity(adapter, pipe, state, layout, config, rows=None, seed=3, sigma=0.6):
    rows = list(range(state.batch)) if rows is None else rows
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(state.batch, layout.tokens, state.noise.shape[2], generator=draw)[rows]
    beside = layout.resized(state.reference_grid)
    reference = restrict(state.reference, beside)[rows]
    with torch.no_grad():
        return adapter.velocity(pipe, state, tokens, sigma, rows, layout, reference, beside, config)


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- guidance, packed


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("changes", [{}, {"key_bias": "none"}, {"rope": "phase_aligned"}, {"attention": "torch"}])
def test_packed_and_separate_guidance_agree(plus, zero_cond_t, changes):
    pipe = plus.make(zero_cond_t=zero_cond_t)
    adapter, state = plus.prepare(pipe, (144, 112), **GUIDED)
    lengths = [state.extra[name]["encoder_hidden_states"].shape[1] for name in ("positive", "negative")]
    assert lengths[0] != lengths[1]  # nothing would be shown if both halves had one length
    for layout in (mixed_layout(state.grid), MixedLayout.all_coarse(state.grid), MixedLayout.all_fine(state.grid)):
        packed, separate = (
            velocity(adapter, pipe, state, layout, SpecEditConfig(cfg=cfg, **changes)) for cfg in ("packed", "separate")
        )
        close(packed, separate, 1e-5)


def test_packed_guidance_is_one_forward_without_padding(edit, monkeypatch):
    pipe = edit.make()
    adapter, state = edit.prepare(pipe, **GUIDED)
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    layout = mixed_layout(state.grid)
    velocity(adapter, pipe, state, layout, SpecEditConfig())
    beside = layout.resized(state.reference_grid)
    texts = [state.extra[name]["encoder_hidden_states"].shape[1] for name in ("positive", "negative")]
    assert len(seen) == 1
    assert seen[0]["hidden_states"].shape[:2] == (1, 2 * (layout.tokens + beside.tokens))
    assert seen[0]["encoder_hidden_states"].shape[:2] == (1, sum(texts))
    packing = seen[0]["attention_kwargs"]["specedit"].packing
    ends = [0, texts[0] + layout.tokens + beside.tokens, sum(texts) + 2 * (layout.tokens + beside.tokens)]
    assert packing.cu_seqlens.tolist() == ends and packing.longest == max(ends[1], ends[2] - ends[1])
    rows = torch.cat([packing.text, packing.image]).sort().values
    assert torch.equal(rows, torch.arange(ends[-1]))  # every row of the joint sequence, once
    seen.clear()
    velocity(adapter, pipe, state, layout, SpecEditConfig(cfg="separate"))
    assert len(seen) == 2


@pytest.mark.parametrize("cfg", ["packed", "separate"])
def test_guidance_is_rescaled_to_the_norm_under_the_prompt(edit, cfg):
    pipe, config = edit.make(), SpecEditConfig(cfg=cfg)
    adapter, state = edit.prepare(pipe, **GUIDED)
    layout = mixed_layout(state.grid)
    got = velocity(adapter, pipe, state, layout, config)
    halves = []
    for prompt in ("make it red", "blue and dark"):
        _, alone = edit.prepare(pipe, prompt=prompt, true_cfg_scale=1.0)
        halves.append(velocity(adapter, pipe, alone, layout, config))
    combined = halves[1] + 2.5 * (halves[0] - halves[1])
    norms = [x.square().sum(-1, keepdim=True).sqrt() for x in (halves[0], combined)]
    close(got, combined * norms[0] / norms[1])
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
    assert state.extra["positive"]["lengths"][0] < state.extra["positive"]["lengths"][1]
    for config in (SpecEditConfig(), SpecEditConfig(attention="stock")):
        layout = mixed_layout(state.grid)
        both = velocity(adapter, pipe, state, layout, config)
        for row in (0, 1):
            _, alone = edit.prepare(pipe, image=changes["image"][row], prompt=changes["prompt"][row])
            alone.noise = alone.noise.repeat(2, 1, 1)  # only its batch counts here
            alone.reference = alone.reference.repeat(2, 1, 1)
            for name in ("encoder_hidden_states",):
                alone.extra["positive"][name] = alone.extra["positive"][name].repeat(2, 1, 1)
            close(velocity(adapter, pipe, alone, layout, config)[row], both[row])


# ------------------------------------------------------------------------------------------------ several references


def test_several_references_each_on_its_own_grid(plus, monkeypatch):
    pipe = plus.make()
    adapter, state = plus.prepare(pipe, (128, 128))
    grids = state.reference_grid.grids
    assert isinstance(state.reference_grid, GridSet) and len(set(grids)) == 2 and grids[1] == state.grid
    assert torch.equal(state.aligned, state.reference[:, grids[0].tokens :])
    layout = mixed_layout(state.grid)
    beside = layout.resized(state.reference_grid)
    assert isinstance(beside, LayoutSet) and [part.grid for part in beside.parts] == list(grids)
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    velocity(adapter, pipe, state, layout, SpecEditConfig())
    assert seen[0]["hidden_states"].shape[1] == layout.tokens + sum(part.tokens for part in beside.parts)
    coarse = MixedLayout.all_coarse(state.grid)
    velocity(adapter, pipe, state, coarse, SpecEditConfig())
    assert seen[1]["hidden_states"].shape[1] == 16 + sum(grid.coarse().tokens for grid in grids)


def test_several_references_through_every_stage(plus):
    stock = plus.run(plus.make(), num_inference_steps=2, **GUIDED)
    pipe = specedit.install(plus.make(), steps=(0, 0, 2))
    close(plus.run(pipe, **GUIDED), stock)
    for restore in ("full", "reference"):
        specedit.install(pipe, restore=restore, **QUICK)
        assert plus.run(pipe, **GUIDED).shape == stock.shape
    report = specedit.report(pipe)
    assert [stage.name for stage in report.stages if stage.steps] == ["draft", "coarse", "mixed"]


def test_locked_cells_take_the_aligned_reference(plus):
    pipe = specedit.install(plus.make(), restore="reference", **QUICK)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    tokens = plus.run(pipe, edit_mask=mask)
    _, state = plus.prepare(plus.make(), (128, 128))
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[:2, :2] = False
    assert torch.equal(tokens[0, kept.flatten()], state.aligned[0, kept.flatten()])


def test_the_aligned_reference_has_the_outputs_shape():
    square = TokenGrid(64, 64)
    assert nearest_shape([(1024, 1024), (768, 1344)], square) == 0
    assert nearest_shape([(768, 1344), (1024, 1024)], square) == 1
    assert nearest_shape([(1024, 1024), (512, 512)], square) == 1  # of equal ones the last
    assert nearest_shape([(1344, 768), (768, 1344), (800, 1312)], TokenGrid(48, 84)) == 1
    assert nearest_shape([(512, 1024)], square) == 0


def test_output_follows_the_last_picture(plus, picture):
    pipe = plus.make()
    images = [picture(128, 64), picture(64, 128)]
    stock = pipe(image=images, prompt="a", num_inference_steps=1, output_type="np").images
    adapter, state = plus.prepare(pipe, image=images, height=None, width=None)
    assert (16 * state.grid.height, 16 * state.grid.width) == stock.shape[1:3]
    assert state.reference_grid.grids[1] == state.grid and state.extra["source"].shape[-2:] == stock.shape[1:3]


# --------------------------------------------------------------------------------------------------------- stages


def test_text_stands_in_one_place_but_for_the_draft(edit):
    pipe = edit.make()
    offsets = []
    forward = pipe.transformer.forward

    def watch(**kwargs):
        offsets.append((kwargs["hidden_states"].shape[1], kwargs["img_shapes"].frequencies))
        return forward(**kwargs)

    pipe.transformer.forward = watch
    specedit.install(pipe, key_bias="none", attention="stock", **QUICK)
    edit.run(pipe, (160, 96))
    texts = [text for _, (_, text) in offsets]
    assert len(texts) == 6
    assert all(torch.equal(text, texts[2]) for text in texts[2:]) and torch.equal(texts[0], texts[1])
    theirs = pipe.transformer.pos_embed.pos_freqs
    # 160 x 96 px beside a reference of 160 x 96: 10 rows, so the text begins at 5; in the draft at 3 // 2.
    assert torch.equal(texts[2], theirs[5 : 5 + len(texts[2])]) and torch.equal(texts[0], theirs[1 : 1 + len(texts[0])])


def test_the_draft_may_see_a_smaller_picture(edit, picture):
    def vision_tokens(pipe):
        sizes = []
        encode = pipe.encode_prompt
        pipe.encode_prompt = lambda **kwargs: sizes.append(kwargs["image"].size) or encode(**kwargs)
        return sizes

    texts = []
    for condition in ("full", "small"):
        pipe = edit.make()
        sizes = vision_tokens(pipe)
        specedit.install(pipe, draft_condition=condition, **QUICK)
        edit.run(pipe, **GUIDED)
        report = specedit.report(pipe)
        texts.append([next(s.tokens for s in report.stages if s.name == name) for name in ("draft", "full")])
        assert sizes == [(128, 128)] * 2 + ([(32, 32)] * 2 if condition == "small" else [])
    assert texts[0][1] == texts[1][1]  # the main run keeps the full prompt
    assert texts[0][0] - texts[1][0] == 3  # four vision tokens became one


def test_embeddings_that_were_given_serve_the_draft_as_they_are(edit):
    pipe = edit.make()
    embeds = torch.randn(1, 7, 16)
    mask = torch.ones(1, 7, dtype=torch.long)
    adapter, state = edit.prepare(pipe, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask)
    small = adapter.draft_state(pipe, state, SpecEditConfig(draft_condition="small"))
    assert torch.equal(small.extra["positive"]["encoder_hidden_states"], embeds)
    assert small.extra["offset"] < state.extra["offset"]


def test_features_are_what_the_decoder_computes(edit):
    pipe = edit.make()
    adapter, state = edit.prepare(pipe, (144, 112))
    decoder, seen, handles = pipe.vae.decoder, [], []
    for module in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        handles.append(module.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    with torch.no_grad():
        adapter.decode(pipe, state, state.noise, "pt")
        expected = list(seen)
        got = adapter.features(pipe, state.noise, state.grid)
    for handle in handles:
        handle.remove()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, :, 0])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_are_the_stock_pipelines(edit, output_type):
    stock = edit.run(edit.make(), (160, 96), num_inference_steps=2, output_type=output_type)
    images = edit.run(specedit.install(edit.make(), steps=(0, 0, 2)), (160, 96), output_type=output_type)
    first, second = (torch.as_tensor(np.array(x[0]).astype(np.float32)) for x in (stock, images))
    assert first.shape == second.shape
    assert (first - second).abs().max() <= (1 if output_type == "pil" else 1e-3)


def test_keep_pixels_gives_back_the_input(edit, picture):
    pipe = specedit.install(edit.make(), keep_pixels=True, **QUICK)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    image = edit.run(pipe, edit_mask=mask, output_type="pil")[0]
    assert np.array_equal(np.asarray(image)[32:], np.asarray(picture())[32:])
    assert not np.array_equal(np.asarray(image)[:32, :32], np.asarray(picture())[:32, :32])


# ------------------------------------------------------------------------------------------------ what callers do


def test_many_images_of_one_prompt_with_generators(edit):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    stock = edit.run(edit.make(), num_inference_steps=2, num_images_per_prompt=2, generator=generators(), **GUIDED)
    pipe = specedit.install(edit.make(), steps=(0, 0, 2))
    close(edit.run(pipe, num_images_per_prompt=2, generator=generators(), **GUIDED), stock)
    assert (stock[0] - stock[1]).abs().max() > 0.1


def test_callbacks(edit):
    heard = []

    def callback(pipe, index, timestep, given):
        heard.append((index, given["latents"].shape, given["prompt_embeds"].shape))
        return {"latents": given["latents"] * 0} if index == 3 else {}

    pipe = specedit.install(edit.make(), **QUICK)
    names = ["latents", "prompt_embeds"]
    tokens = edit.run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **GUIDED)
    assert [index for index, *_ in heard] == [0, 1, 2, 3]
    assert {shape for _, shape, _ in heard} == {(1, 64, 16)} and (tokens == 0).all()
    length = heard[0][2][1]

    def other_prompt(pipe, index, timestep, given):
        return {"prompt_embeds": torch.zeros(1, length, 16)}

    plain, changed = (edit.run(pipe, callback_on_step_end=each) for each in (None, other_prompt))
    assert (plain - changed).abs().max() > 1e-4


def test_two_threads(edit, plus):
    pipes = [specedit.install(family.make(), **QUICK) for family in (edit, plus, edit)]
    families = [edit, plus, edit]
    expected = [
        family.run(pipe, seed=i, **GUIDED) for i, (family, pipe) in enumerate(zip(families, pipes, strict=True))
    ]
    results = [None] * 3

    def work(i):
        results[i] = families[i].run(pipes[i], seed=i, **GUIDED)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_an_exception_leaves_the_pipeline_usable(edit):
    pipe = edit.make()
    before, kept = edit.run(pipe, num_inference_steps=2), trace(pipe)
    specedit.install(pipe, **QUICK)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        edit.run(pipe, callback_on_step_end=fail)
    specedit.uninstall(pipe)
    assert torch.equal(edit.run(pipe, num_inference_steps=2), before)
    assert trace(pipe)[0] is kept[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(image=None), TypeError, "image: expected a PIL image or a list of them, got NoneType"),
        (dict(image=[]), ValueError, "image: expected at least one picture, got an empty list"),
        (dict(image=np.zeros((128, 128, 3))), TypeError, "image: expected a PIL image or a list of them, got ndarray"),
        (dict(image=Image.new("RGBA", (128, 128))), ValueError, "image: expected an RGB picture, got mode 'RGBA'"),
        (dict(image=Image.new("RGB", (64, 9000))), ValueError, "image: expected sides less unequal, got 64 x 9000"),
        (dict(image=[Image.new("RGB", (99, 99))] * 2), ValueError, "image: expected one picture .* fit 1 edits, got 2"),
        (dict(height=8), ValueError, "height: expected at least 16 px, got 8"),
        (dict(prompt=None), ValueError, "Provide either `prompt` or `prompt_embeds`"),
        (dict(prompt=3), ValueError, "`prompt` has to be of type `str` or `list`"),
        (dict(latents=torch.zeros(1, 9, 16)), ValueError, r"latents: expected shape \(1, 64, 16\), got \(1, 9, 16\)"),
        (dict(prompt=["a", "b"], **GUIDED), ValueError, "negative_prompt: expected 2, one for each prompt, got 1"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), ValueError, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_input(edit, picture, changes, error, message):
    pipe = specedit.install(edit.make(), **QUICK)
    if changes.get("prompt") == ["a", "b"]:
        changes = changes | {"image": [picture(), picture()]}
    with pytest.raises(error, match=message):
        edit.run(pipe, **changes)


def test_plus_takes_one_prompt(plus):
    pipe = specedit.install(plus.make(), **QUICK)
    with pytest.raises(ValueError, match="prompt: expected one prompt a call for QwenImageEditPlusPipeline, got 2"):
        plus.run(pipe, prompt=["a", "b"])


def test_what_cannot_be_accelerated_runs_stock_with_a_reason(edit):
    pipe = edit.make()
    stock = edit.run(pipe, sigmas=[1.0, 0.5], num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="sigmas were given"):
        assert torch.equal(edit.run(pipe, sigmas=[1.0, 0.5], num_inference_steps=2), stock)
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert "guidance-distilled" in QwenImageEdit().refusal(pipe, {})


def test_adapters_know_their_own_pipelines(edit, plus):
    for make, adapter in ((edit.make, QwenImageEdit), (plus.make, QwenImageEditPlus)):
        matching = [each for each in specedit.models.adapters() if each.matches(make())]
        assert matching == [adapter]
    assert QwenImageEditPipeline.__name__ in QwenImageEdit.pipelines

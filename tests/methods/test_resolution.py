"""What every method does that changes resolution."""

import numpy as np
import pytest
import torch

import specedit
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid
from specedit.methods import Bottleneck, Fresco, Ralu, Speed
from specedit.methods.resolution import repeated, top_share
from tests.methods import oracle

SHORT = {"ralu": Ralu((1, 1, 1)), "fresco": Fresco((1, 1, 1)), "bottleneck": Bottleneck((1, 1, 1)), "speed": Speed(4)}
each = pytest.mark.parametrize("method", SHORT.values(), ids=SHORT)
geometries = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])


@each
@geometries
@pytest.mark.parametrize("shape", [(8, 12), (7, 9)], ids=str)
def test_it_ends_at_the_models_answer(method, geometry, shape):
    target = oracle.normal(2, shape[0] * shape[1], oracle.CHANNELS, seed=3)
    run = oracle.make_run(method, shape, geometry, target)
    torch.testing.assert_close(oracle.edit(run).tokens, target)
    assert any(layout.is_coarse for layout, *_ in run.adapter.seen) and run.adapter.seen[-1][0].is_fine


@each
@geometries
@pytest.mark.parametrize("shape", [(32, 32), (31, 33)], ids=str)
def test_every_stage_starts_with_white_noise_of_its_level(method, geometry, shape):
    """Of an empty picture a state is noise alone: variance sigma^2, and nothing between neighbouring latent pixels."""
    run = oracle.make_run(method, shape, geometry)
    oracle.edit(run)
    for layout, tokens, sigma in run.adapter.starts:
        noise = tokens / sigma
        count = noise.numel()
        assert float(noise.pow(2).mean()) == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
        fine = layout.full_grid(tokens / sigma)
        if layout.is_fine:
            image = geometry.to_image(fine, shape)
            for shift in ((0, 1), (1, 0), (1, 1)):
                moved = image.roll(shift, (-2, -1))
                assert abs(float((image * moved).mean())) < 5 / count**0.5


@each
def test_it_edits_with_kontext(method, pipe, edit):
    specedit.install(pipe, method=method)
    first, again = edit(pipe), edit(pipe)
    assert first.shape == (1, 64, 16) and first.isfinite().all() and torch.equal(first, again)
    report = specedit.report(pipe)
    stages = [stage for stage in report.stages if stage.steps]
    assert report.nfe == method.nfe == sum(stage.steps for stage in stages)
    assert report.edit_mask is None and report.draft_steps == 0
    assert min(stage.tokens for stage in stages) < stages[-1].tokens
    assert report.flops == pytest.approx(sum(stage.flops for stage in stages)) and report.flops > 0
    assert np.asarray(edit(pipe, output_type="pil")[0]).shape == (128, 128, 3)


@each
def test_it_edits_with_qwen_under_true_guidance(method, make_qwen, picture):
    pipe = make_qwen()
    call = dict(image=picture(), prompt="make it red", height=128, width=128, output_type="latent")

    def edit(**more):
        return pipe(**call, **more, generator=torch.Generator().manual_seed(0)).images

    specedit.install(pipe, method=method)
    free = edit(true_cfg_scale=1.0)
    alone = specedit.report(pipe).flops
    guided = edit(negative_prompt="blue", true_cfg_scale=2.5)
    assert guided.isfinite().all() and not torch.equal(free, guided)
    assert specedit.report(pipe).flops > 1.9 * alone


@each
@pytest.mark.parametrize("size", [(144, 176), (64, 112)], ids=str)
def test_odd_and_oblong_grids(method, pipe, edit, size):
    specedit.install(pipe, method=method)
    tokens = edit(pipe, size)
    assert tokens.shape == (1, size[0] * size[1] // 256, 16) and tokens.isfinite().all()


@each
def test_a_sample_does_not_depend_on_its_batch(method, pipe, edit, picture):
    specedit.install(pipe, method=method)
    pictures, prompts = [picture(seed=i) for i in range(2)], ["red", "make it large"]
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = edit(pipe, image=pictures, prompt=prompts, generator=seeds)
    for i in range(2):
        alone = edit(pipe, image=pictures[i], prompt=prompts[i], seed=i)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@each
def test_callbacks_see_every_step_and_may_change_it(method, pipe, edit):
    seen = []

    def look(pipe, index, timestep, tensors):
        seen.append((index, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == method.nfe - 1 else {}

    specedit.install(pipe, method=method)
    assert not edit(pipe, callback_on_step_end=look).any()
    assert [index for index, *_ in seen] == list(range(method.nfe))
    assert seen[0][1] == 1000 and {shape for *_, shape in seen} == {(1, 64, 16)}


@each
@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupt_stops_at_once(method, pipe, edit, at, count_calls):
    calls = count_calls(pipe.transformer)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == at

    specedit.install(pipe, method=method)
    assert edit(pipe, callback_on_step_end=stop).shape == (1, 64, 16)
    assert len(calls) == specedit.report(pipe).nfe == at + 1


@each
def test_a_mask_keeps_the_pixels_outside(method, pipe, edit, picture):
    mask = torch.zeros(128, 128)
    mask[:32, :32] = 1
    specedit.install(pipe, method=method, keep_pixels=True)
    image = edit(pipe, edit_mask=mask, output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    assert torch.equal(image[:, 64:, 64:], source[:, 64:, 64:])
    assert not torch.equal(image[:, :16, :16], source[:, :16, :16])
    assert specedit.report(pipe).edit_fraction == 1 / 16


@each
def test_the_calls_steps_take_precedence(method, pipe, edit):
    specedit.install(pipe, method=method)
    edit(pipe, num_inference_steps=5)
    assert specedit.report(pipe).nfe == 5


@pytest.mark.parametrize("method", [m for m in SHORT.values() if m.name in ("ralu", "fresco", "bottleneck")])
def test_fewer_steps_than_stages_are_an_error_before_any_work(method, pipe, edit):
    specedit.install(pipe, method=method)
    pipe.transformer.forward = None
    message = f"^num_inference_steps: expected at least 3 with method='{method.name}', one for each stage, got 2"
    with pytest.raises(ValueError, match=message):
        edit(pipe, num_inference_steps=2)


@each
@pytest.mark.parametrize("size", [(48, 128), (128, 32)], ids=str)
def test_a_picture_that_cannot_be_halved_twice_runs_stock(method, pipe, edit, size):
    stock = edit(pipe, size, num_inference_steps=3)
    specedit.install(pipe, method=method)
    with pytest.warns(UserWarning, match="fewer than 4 tokens a side, 64 px, is too small"):
        assert torch.equal(edit(pipe, size, num_inference_steps=3), stock)


@each
@pytest.mark.parametrize("shape", [(3, 8), (8, 2)], ids=str)
def test_such_a_picture_is_an_error_where_the_family_accepts_it(method, shape):
    run = oracle.make_run(method, shape)
    height, width = (16 * side for side in shape)
    message = f"^height, width: expected at least 64 px a side with method='{method.name}', .* got {height} x {width}"
    with pytest.raises(ValueError, match=message):
        oracle.edit(run)
    assert not run.adapter.seen


@each
def test_fields_of_specedit_alone_are_refused(method, pipe):
    with pytest.raises(ValueError, match=rf"^key_bias: expected the default, 'area', with method='{method.name}'"):
        specedit.install(pipe, method=method, key_bias="none")


@each
def test_the_models_own_attention_will_do(method, pipe, edit):
    specedit.install(pipe, method=method)
    own = edit(pipe)
    specedit.install(pipe, method=method, attention="stock")
    torch.testing.assert_close(edit(pipe), own, rtol=1e-4, atol=1e-4)


@each
def test_published_settings_can_be_made(method):
    assert type(method).published
    for setting in type(method).published:
        assert type(method).at(setting).nfe >= 3


@geometries
@pytest.mark.parametrize("shape", [(6, 8), (5, 7)], ids=str)
def test_repeated_pixels_of_a_layout_are_those_of_the_full_grid(geometry, shape):
    grid = TokenGrid(*shape, geometry)
    split = torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(0)) > 0.5
    old, new = MixedLayout.all_coarse(grid), MixedLayout(grid, split)
    tokens = oracle.normal(2, old.tokens, 8)
    moved = repeated(tokens, old, new)
    assert torch.equal(new.full_grid(moved), old.full_grid(tokens))
    assert torch.equal(moved[:, : len(new.locked_cells)], tokens[:, new.locked_cells])


def test_the_top_share_is_of_every_sample():
    score = torch.arange(24.0).view(2, 3, 4)
    chosen = top_share(score, 0.3)
    assert chosen.flatten(1).nonzero().tolist() == [[0, 9], [0, 10], [0, 11], [1, 9], [1, 10], [1, 11]]
    assert top_share(score, 0.01).flatten(1).sum(1).tolist() == [1, 1]

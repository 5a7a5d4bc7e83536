"""SpotEdit: its score, its full steps, its fusion, and whole runs."""

import math

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.forward import flops_of
from specedit.forecast import Fusion, KVCache, PartialForward
from specedit.geometry import UNPACKED
from specedit.layout import MixedLayout, TokenGrid
from specedit.method.adapter import Run
from specedit.method.token_steps import reference_tokens
from specedit.method.trace import step_calls
from specedit.methods import SpotEdit, Steps, spotedit
from specedit.methods.spotedit import fusion_weight, token_score
from specedit.models.flux import FluxKontext
from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from specedit.testing.family import group_of
from tests.methods.common import GUIDED, mask_of

# ------------------------------------------------------------------------------------------------------- unit truths


def test_score_is_the_distance_of_normalised_features_by_hand():
    grid = TokenGrid(1, 2)  # 2 x 4 latents
    same = torch.zeros(1, 2, 2, 4)
    same[:, 0] = 3.0  # of any length: (3, 0) is (1, 0)
    other = same.clone()
    other[:, :, 0, 0] = torch.tensor([0.0, 5.0])  # one latent is orthogonal: 2
    other[:, :, 1, 0] = torch.tensor([-2.0, 0.0])  # one is opposite: 4
    large = torch.zeros(1, 2, 4, 8)  # an upper block at twice the size, which agrees
    large[:, 1] = 1.0
    score = token_score([other, large], [same, large * 2], grid)
    torch.testing.assert_close(score, torch.tensor([[[(2 + 4) / 4 / 2, 0.0]]]))
    unpacked = token_score([other], [same], TokenGrid(2, 4, UNPACKED))
    assert unpacked[0, :, 0].tolist() == pytest.approx([2, 4]) and unpacked[0, :, 1:].abs().max() < 1e-6


def test_full_steps_are_the_published_ones(pipe):
    options = SpotEdit().for_model(FluxKontext())
    assert [i for i in range(50) if options.full(i)] == [0, 1, 2, 3, 13, 22, 31]
    assert (options.threshold, options.dilation, options.reselect) == (0.2, 0, True)
    qwen = SpotEdit().for_model(QwenImageEdit())
    assert (qwen.threshold, qwen.dilation, qwen.reselect) == (0.15, 1, False)
    assert SpotEdit.at("default") == SpotEdit()


@pytest.mark.parametrize(("n", "full"), [(100, [*range(8), 26, 44, 62]), (10, [0, 3, 4, 6]), (1, [0]), (2, [0, 1])])
def test_full_steps_scale_with_the_run(n, full):
    for options in (SpotEdit(), SpotEdit(initial=4, resets=(13, 22, 31))):
        options = options.with_steps(n).for_model(FluxKontext())
        assert options.nfe == n and [i for i in range(n) if options.full(i)] == full


def test_fusion_weight_is_cos_squared():
    assert fusion_weight(0.0) == 1 and fusion_weight(1.0) == pytest.approx(0, abs=1e-12)
    assert fusion_weight(0.5) == pytest.approx(0.5)
    assert fusion_weight(1 / 3) == pytest.approx(math.cos(math.pi / 6) ** 2) == pytest.approx(0.75)


# Where target and reference hold the same, so do their keys before rotation in the first block, at every weight.
@pytest.mark.parametrize("size", [(128, 128), (144, 112)])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_fused_keys_have_the_targets_position(model, size, make_pipe, make_qwen, picture):
    from specedit.testing import Family

    height, width = size
    call = dict(image=picture(height, width), prompt="make it red", height=height, width=width)
    if model == "flux":
        call |= dict(max_area=height * width, _auto_resize=False, max_sequence_length=16)
    adapter, make = (FluxKontext, make_pipe) if model == "flux" else (QwenImageEdit, make_qwen)
    pipe = make()
    adapter, state = Family(adapter, make, lambda *_: call).prepare(pipe, size, **GUIDED)
    run = Run(adapter, pipe, specedit.SpecEditConfig(), state)
    group = group_of(state, MixedLayout.all_fine(state.grid), state.aligned)
    skipped = torch.tensor([[0, 5, 17, state.grid.tokens - 1]])
    rest = torch.tensor([[i for i in range(state.grid.tokens) if i not in skipped]])
    for weight in (0.0, 0.7):
        stores = [KVCache() for _ in range(state.branches)]
        with torch.no_grad():
            adapter.predict(run, group, 0.5, [PartialForward(store) for store in stores])
            kept = [dict(store.entries) for store in stores]
            fusion = Fusion(skipped, reference_tokens(run)[skipped], weight)
            adapter.predict(run, group, 0.5, [PartialForward(store, rest, fusion=fusion) for store in stores])
        for store, before in zip(stores, kept, strict=True):
            for a, b in list(zip(store.entries.values(), before.values(), strict=True))[:1]:
                torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-4)


def test_several_references_are_counted_in_one_row(make_qwen, picture):
    from diffusers import QwenImageEditPlusPipeline

    from specedit.testing import Family

    images = [picture(64, 128, seed=3), picture(144, 112)]
    call = dict(image=images, prompt="make it red", height=144, width=112)
    pipe = make_qwen(QwenImageEditPlusPipeline)
    adapter, state = Family(QwenImageEditPlus, make_qwen, lambda *_: call).prepare(pipe, (144, 112))
    tokens = reference_tokens(Run(adapter, pipe, specedit.SpecEditConfig(), state))
    torch.testing.assert_close(state.reference[:, tokens], state.aligned)
    assert tokens.min() >= state.placements[0].reference.tokens


# -------------------------------------------------------------------------------------------------------- whole runs


def test_nothing_skipped_is_stock(pipe, edit):
    specedit.install(pipe, method=Steps(count=6))
    stock = edit(pipe)
    flops = specedit.report(pipe).flops
    specedit.install(pipe, method=SpotEdit(count=6, initial=2, threshold=0))
    torch.testing.assert_close(edit(pipe), stock, rtol=1e-4, atol=1e-4)
    report = specedit.report(pipe)
    assert (report.nfe, report.reused_steps, report.edit_fraction) == (6, 0, 1) and report.flops == flops
    assert report.score.shape == (1, 8, 8)
    specedit.install(pipe, method=SpotEdit(count=6, initial=6))
    assert torch.equal(edit(pipe), stock)


def test_skipped_tokens_end_as_the_references(pipe, edit, picture):
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, threshold=0))
    whole = edit(pipe)
    score = specedit.report(pipe).score
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, threshold=float(score.median()), resets=()))
    latents, report = edit(pipe), specedit.report(pipe)
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, threshold=4))
    reference = edit(pipe)  # every token looks like the reference
    same = (latents == reference).all(-1)[0]
    assert 0.2 < same.float().mean() < 0.9 and not (whole == reference).all(-1).any()
    changed = ~same.view(4, 2, 4, 2).transpose(1, 2).flatten(2).all(-1)
    assert torch.equal(report.edit_mask[0], changed) and report.reused_steps > 0


def test_everything_skipped_computes_nothing_more(pipe, edit):
    specedit.install(pipe, method=SpotEdit(count=6, initial=2, resets=(4,), threshold=4))
    edit(pipe)
    spot = specedit.report(pipe)
    specedit.install(pipe, method=Steps(count=3))
    edit(pipe)
    assert spot.flops == specedit.report(pipe).flops and (spot.nfe, spot.cached_steps) == (6, 3)


def test_flops_are_those_of_the_tokens_that_run(pipe, edit):
    specedit.install(pipe, method=SpotEdit(count=6, initial=2, resets=(4,)))
    edit(pipe, edit_mask=mask_of((0, 0), (1, 2)))
    calls = [step_calls("", [16], 64, 64, samples=1, trims=True)[0]] * 3
    calls += [step_calls("", [16], 64, 64, samples=1, trims=True, fresh=8)[0]] * 3
    report = specedit.report(pipe)
    assert report.flops == flops_of(calls, pipe.transformer.config)
    assert report.edit_fraction == 2 / 16 and report.cache_bytes > 0 and report.reused_steps == 3


@pytest.mark.slow
@pytest.mark.parametrize(("size", "fusion"), [((128, 128), "none"), ((144, 112), "cosine")])
def test_samples_find_their_own_tokens(pipe, edit, picture, size, fusion):
    height, width = size
    both = dict(image=[picture(height, width, seed=i) for i in range(2)], prompt=["red", "make it large"])
    masks = [mask_of((0, 0), size=size), mask_of((1, 1), (2, 1), size=size)]

    def of_both(**more):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return edit(pipe, size, generator=generators, **both, **more), specedit.report(pipe)

    specedit.install(pipe, method=SpotEdit(count=5, initial=2, resets=(3,), threshold=0))
    threshold = float(of_both()[1].score.quantile(0.9))
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, resets=(3,), threshold=threshold, fusion=fusion))
    for given in (False, True):
        more = dict(edit_mask=masks) if given else {}
        together, report = of_both(**more)
        edited = report.edit_mask.flatten(1)
        assert edited.any(1).all() and not edited.all(1).any() and not torch.equal(edited[0], edited[1])
        for row, seed in enumerate((5, 6)):
            one = {name: value[row] for name, value in (both | more).items()}
            alone = edit(pipe, size, generator=torch.Generator().manual_seed(seed), **one)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_equal_masks_run_together(pipe, edit, count_calls):
    specedit.install(pipe, method=SpotEdit(count=4, initial=2))
    calls = count_calls(pipe.transformer)
    edit(pipe, edit_mask=mask_of((1, 1)), num_images_per_prompt=2)
    assert len(calls) == 4
    edit(pipe, edit_mask=[mask_of((1, 1)), mask_of((1, 2))], num_images_per_prompt=2)
    assert len(calls) == 12 and specedit.report(pipe).edit_mask.flatten(1).float().sum(1).tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the output is 112 x 144 px")
def test_qwen_with_both_guidance_branches(make_qwen, picture):
    pipe = make_qwen()
    call = dict(image=picture(144, 112), prompt="make it red", height=144, width=112, output_type="latent", **GUIDED)

    def run(**more):
        return pipe(generator=torch.Generator().manual_seed(0), **call, **more).images

    specedit.install(pipe, method=Steps(count=5))
    stock = run()
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, resets=(), threshold=0))
    torch.testing.assert_close(run(), stock, rtol=1e-3, atol=1e-3)
    threshold = float(specedit.report(pipe).score.median())
    specedit.install(pipe, method=SpotEdit(count=5, initial=2, resets=(), threshold=threshold, dilation=0))
    assert run().isfinite().all() and specedit.report(pipe).reused_steps == 3
    assert 0 < specedit.report(pipe).edit_fraction < 1
    run(edit_mask=mask_of((1, 1), size=(144, 112)))
    assert specedit.report(pipe).reused_steps == 3


def test_a_region_grows_by_the_dilation(pipe, edit):
    specedit.install(pipe, method=SpotEdit(count=3, initial=2, resets=(), threshold=0))
    edit(pipe)
    threshold = float(specedit.report(pipe).score.quantile(0.95))
    shares = []
    for dilation in (0, 1, 9):
        specedit.install(pipe, method=SpotEdit(count=3, initial=2, resets=(), threshold=threshold, dilation=dilation))
        edit(pipe)
        shares.append(specedit.report(pipe).edit_fraction)
    assert shares[0] < shares[1] < shares[2] == 1


def test_selection_once_after_each_full_step(pipe, edit, monkeypatch):
    calls = []
    monkeypatch.setattr(spotedit, "token_score", lambda *a: calls.append(1) or token_score(*a))
    for reselect, expected in ((True, 4), (False, 2)):
        calls.clear()
        specedit.install(pipe, method=SpotEdit(count=7, initial=2, resets=(4,), threshold=4, reselect=reselect))
        edit(pipe)
        assert len(calls) == expected


def test_keep_pixels_with_a_mask(pipe, edit, picture):
    specedit.install(pipe, method=SpotEdit(count=3, initial=1), keep_pixels=True)
    image = edit(pipe, edit_mask=mask_of((0, 0)), output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    assert torch.equal(image[:, 64:, 64:], source[:, 64:, 64:])


def test_keep_pixels_gives_back_what_it_skipped(pipe, edit, picture):
    specedit.install(pipe, method=SpotEdit(count=4, initial=2, resets=(), threshold=0))
    edit(pipe)
    threshold = float(specedit.report(pipe).score.quantile(0.9))
    specedit.install(pipe, method=SpotEdit(count=4, initial=2, resets=(), threshold=threshold), keep_pixels=True)
    image = edit(pipe, output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    edited = specedit.report(pipe).edit_mask[0].repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert edited.any() and not edited.all()
    assert torch.equal(image[:, ~edited], source[:, ~edited]) and not torch.equal(image[:, edited], source[:, edited])


def test_scores_that_overflow_leave_the_picture_as_stock(pipe, edit, monkeypatch):
    monkeypatch.setattr(spotedit, "token_score", lambda first, second, grid: torch.full((1, *grid.shape), torch.nan))
    specedit.install(pipe, method=SpotEdit(count=4, initial=2, resets=()))
    edit(pipe)
    assert (specedit.report(pipe).overflowed, specedit.report(pipe).reused_steps) == (1, 0)


def test_callbacks_see_every_step_and_may_interrupt(pipe, edit):
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append(tensors["latents"].shape)
        pipe._interrupt = index == 3

    specedit.install(pipe, method=SpotEdit(count=6, initial=2, threshold=4))
    latents = edit(pipe, callback_on_step_end=watch)
    assert seen == [(1, 64, 16)] * 4 and specedit.report(pipe).nfe == 4
    specedit.install(pipe, method=SpotEdit(count=6, initial=2, threshold=4))
    assert not torch.equal(edit(pipe), latents)  # what was interrupted is not yet the reference


def test_a_new_prompt_brings_a_full_step(pipe, edit):
    def replace(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if index == 2 else {}

    specedit.install(pipe, method=SpotEdit(count=6, initial=2, resets=(), threshold=4))
    edit(pipe, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert specedit.report(pipe).cached_steps == 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(count=0), ValueError, "^count: expected an integer of at least 1"),
        (dict(count=5, initial=6), ValueError, "^initial: expected an integer from 1 to count=5"),
        (dict(resets=3), TypeError, "^resets: expected ascending integers from 1 to 49"),
        (dict(resets=(5, 5)), ValueError, "^resets: expected ascending"),
        (dict(count=5, resets=(5,)), ValueError, "^resets: expected ascending integers from 1 to 4"),
        (dict(threshold=5), ValueError, "^threshold: expected a number from 0 to 4, or None, got 5"),
        (dict(threshold="high"), TypeError, "^threshold: expected a number"),
        (dict(dilation=-1), ValueError, "^dilation: expected an integer of at least 0, or None"),
        (dict(reselect=1), TypeError, "^reselect: expected True, False or None, got 1"),
        (dict(fusion="cosin"), ValueError, "^fusion: expected 'cosine' or 'none', got 'cosin'; did you mean 'cosine'"),
    ],
)
def test_options_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        SpotEdit(**fields)

"""RegionE: its partition, its jumps, its decay, and whole runs."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.forward import flops_of
from specedit.layout import TokenGrid
from specedit.method.adapter import Adapter
from specedit.method.trace import step_calls
from specedit.methods import RegionE, Steps, regione
from specedit.methods.regione import (
    GAMMA_FLUX,
    GAMMA_QWEN,
    GAMMA_QWEN_PLUS,
    decay_factors,
    edited_tokens,
    gamma_of,
    one_step,
)
from specedit.models.flux import FluxKontext
from specedit.models.longcat import LongCatImageEdit
from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from tests.methods.common import GUIDED, mask_of

# ------------------------------------------------------------------------------------------------------- unit truths


def partition(changed, threshold=0.9):
    """The partition of a grid whose changed tokens are orthogonal to the reference."""
    changed = torch.tensor(changed)
    reference = torch.tensor([2.0, 0.0]).expand(1, changed.numel(), 2)
    clean = torch.where(changed.flatten()[None, :, None] > 0, torch.tensor([0.0, 1.0]), 5 * reference)
    grid = TokenGrid(*changed.shape)
    return edited_tokens(clean, reference, grid, threshold).view(grid.shape).int().tolist()


def test_partition_by_hand():
    single = [[0] * 7 for _ in range(7)]
    single[3][3] = 1
    assert partition(single) == [[0] * 7] * 7  # a lone token is noise: erosion by a cross removes it
    cross = [row[:] for row in single]
    for row, column in ((2, 3), (4, 3), (3, 2), (3, 4)):
        cross[row][column] = 1
    grown = [[int(1 <= row <= 5 and 1 <= column <= 5) for column in range(7)] for row in range(7)]
    assert partition(cross) == grown  # its centre remains, and becomes a square of 5
    assert partition([[1] * 4] * 2) == [[0] * 4] * 2  # beyond the border nothing counts as edited
    assert partition([[1] * 4] * 3) == [[1] * 4] * 3


def test_partition_compares_directions():
    reference = torch.tensor([1.0, 0.0]).expand(1, 9, 2)
    turned = torch.tensor([math.cos(0.5), math.sin(0.5)]).expand(1, 9, 2)  # similarity 0.878
    grid = TokenGrid(3, 3)
    assert not edited_tokens(7 * turned, reference, grid, 0.87).any()
    assert edited_tokens(7 * turned, reference, grid, 0.88).all()
    assert edited_tokens(turned * math.nan, reference, grid, 0.5).all()


def test_one_step_is_exact_for_a_straight_trajectory():
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 3, generator=draw)
    at = {s: (1 - s) * clean + s * noise for s in (0.8, 0.3, 0.0)}
    for arrival in (0.3, 0.0):
        torch.testing.assert_close(one_step(at[0.8], noise - clean, 0.8, arrival), at[arrival])


def test_gamma_is_each_models_own():
    for adapter, gamma in (
        (FluxKontext, GAMMA_FLUX), (QwenImageEdit, GAMMA_QWEN), (QwenImageEditPlus, GAMMA_QWEN_PLUS),
        (LongCatImageEdit, GAMMA_FLUX),
    ):  # fmt: skip
        assert gamma_of(adapter()) is gamma and len(gamma) == 27
    assert decay_factors(GAMMA_FLUX, 28) is GAMMA_FLUX


@pytest.mark.parametrize("count", [2, 7, 14, 50])
def test_gamma_keeps_its_product_at_any_number_of_steps(count):
    factors = decay_factors(GAMMA_QWEN, count)
    assert len(factors) == count - 1
    assert math.prod(factors) == pytest.approx(math.prod(GAMMA_QWEN))
    halves = decay_factors((1.1, 1.1, 0.9), 7)  # each fitted step becomes two
    assert halves == pytest.approx([1.1**0.5] * 4 + [0.9**0.5] * 2)


def test_stages_are_the_published_ones():
    options = RegionE().for_model(FluxKontext())
    assert options.full_steps() == (*range(6), 15, 26, 27)
    assert (options.threshold, options.decay_threshold) == (0.93, 0.04)
    qwen = RegionE().for_model(QwenImageEdit())
    assert (qwen.threshold, qwen.decay_threshold) == (0.80, 0.03)


@pytest.mark.parametrize(
    ("n", "full"),
    [(56, (*range(12), 31, 52, 53, 54, 55)), (14, (0, 1, 2, 7, 13)), (4, (0, 3)), (2, (0, 1)), (1, (0,))],
)
def test_stages_scale_with_the_run(n, full):
    for options in (RegionE(), RegionE(warmup=6, smooth=2, refresh=(16,))):
        options = options.with_steps(n)
        assert options.nfe == n and options.for_model(FluxKontext()).full_steps() == full


# -------------------------------------------------------------------------------------------------------- whole runs


class Straight:
    """Makes an adapter's velocity what a function of sigma says, and counts how many tokens each step computed."""

    def __init__(self, monkeypatch, velocity):
        self.tokens = []

        def predict(_, run, group, sigma, partial=None):
            whole = velocity(group, sigma)
            if partial and not partial[0].partial:
                partial[0].store.entries[1] = (whole, whole)
            index = partial[0].index if partial else None
            self.tokens.append(whole.shape[1] if index is None else index.shape[1])
            return [whole if index is None else whole.gather(1, index[..., None].expand(-1, -1, whole.shape[2]))]

        monkeypatch.setattr(FluxKontext, "predict", predict)
        monkeypatch.setattr(FluxKontext, "velocity", Adapter.velocity)


def test_velocity_decays_by_the_published_formula(pipe, edit, monkeypatch):
    calls = Straight(monkeypatch, lambda group, sigma: torch.full_like(group.tokens, 1.0))
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append(tensors["latents"][0, 0, 0].item())

    mask = mask_of((0, 0))
    options = RegionE(count=28, decay_threshold=0.12)
    specedit.install(pipe, method=options)
    edit(pipe, edit_mask=mask, callback_on_step_end=watch)
    sigmas = FluxKontext().sigmas(pipe, 64, 1.0, 0.0, 28).tolist()
    velocities = [(b - a) / (sigmas[i + 2] - sigmas[i + 1]) for i, (a, b) in enumerate(pairwise(seen))]
    full, expected, last, product, computed = {*range(6), 15, 26, 27}, [], 1.0, 1.0, 6
    for i in range(28):
        factor = GAMMA_FLUX[i - 1] * (1 - (sigmas[i - 1] - sigmas[i]))
        product *= factor
        if i in full or i == 6 or factor >= 1 or 1 - product > 0.12:
            last, product, computed = 1.0, 1.0, computed + (i not in full)
        expected.append(last * product)
    assert velocities == pytest.approx(expected[1:], rel=1e-2)
    assert 0.8 < min(expected) < 0.98 and len(calls.tokens) == computed + 3
    report = specedit.report(pipe)
    assert (report.cached_steps, report.reused_steps) == (28 - len(calls.tokens), len(calls.tokens) - 9)


def test_straight_trajectories_arrive_exactly(pipe, edit, monkeypatch):
    def velocity(group, sigma):  # e - x0 of every token, x0 = 0
        return group.tokens / max(sigma, 1e-3)

    Straight(monkeypatch, velocity)
    specedit.install(pipe, method=RegionE(count=12, decay_threshold=0, smooth=0))
    outside = edit(pipe, edit_mask=mask_of((0, 0)))[0].view(8, 8, -1)[2:, 2:]
    torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-5, rtol=0)


def test_without_a_region_stage_it_is_stock(pipe, edit):
    specedit.install(pipe, method=Steps(count=5))
    stock, flops = edit(pipe), specedit.report(pipe).flops
    specedit.install(pipe, method=RegionE(count=5, warmup=3, smooth=2))
    assert torch.equal(edit(pipe), stock) and specedit.report(pipe).flops == flops
    assert specedit.report(pipe).edit_fraction == 1


def test_all_edited_and_never_cached_is_stock_but_for_the_references_keys(pipe, edit):
    specedit.install(pipe, method=Steps(count=6))
    stock = edit(pipe)
    specedit.install(pipe, method=RegionE(count=6, warmup=5, smooth=0, threshold=1, decay_threshold=0))
    one = edit(pipe)  # a single step with keys of the step before
    assert specedit.report(pipe).edit_fraction == 1 and specedit.report(pipe).reused_steps == 1
    assert (one - stock).abs().mean() < 0.05 * stock.abs().mean()


def test_flops_are_those_of_the_tokens_that_run(pipe, edit):
    specedit.install(pipe, method=RegionE(count=8, warmup=2, smooth=1, refresh=(5,), decay_threshold=0))
    edit(pipe, edit_mask=mask_of((0, 0), (1, 2)))
    calls = [step_calls("", [16], 64, 64, samples=1, trims=True)[0]] * 4
    calls += [step_calls("", [16], 64, 64, samples=1, trims=True, fresh=8)[0]] * 4
    report = specedit.report(pipe)
    assert report.flops == flops_of(calls, pipe.transformer.config)
    assert report.edit_fraction == 2 / 16 and report.cache_bytes > 0
    assert (report.cached_steps, report.reused_steps) == (0, 4) and "NFE 8 (4 on some tokens alone)" in str(report)
    specedit.install(pipe, method=RegionE(count=8, warmup=2, smooth=1, refresh=(5,), decay_threshold=1))
    edit(pipe, edit_mask=mask_of((0, 0), (1, 2)))
    assert specedit.report(pipe).flops < report.flops


def test_nothing_edited_computes_the_full_steps_alone(pipe, edit):
    specedit.install(pipe, method=RegionE(count=8, threshold=-1))
    edit(pipe)
    region = specedit.report(pipe)
    specedit.install(pipe, method=Steps(count=4))  # two, a forced one, and one to smooth
    edit(pipe)
    assert region.flops == specedit.report(pipe).flops and region.edit_fraction == 0 and region.cached_steps == 4


def threshold_of(pipe, run, quantile=0.8):
    """A threshold at which this share of tokens is edited before the morphology."""
    seen, original = [], regione.edited_tokens

    def keep(clean, reference, *rest):
        seen.append(torch.nn.functional.cosine_similarity(clean, reference, dim=-1))
        return original(clean, reference, *rest)

    regione.edited_tokens = keep
    try:
        run()
    finally:
        regione.edited_tokens = original
    return float(torch.cat(seen).quantile(quantile))


@pytest.mark.slow
def test_samples_find_their_own_regions(pipe, edit, picture):
    size = height, width = (144, 112)
    both = dict(image=[picture(height, width, seed=i) for i in range(2)], prompt=["red", "make it large"])
    masks = [mask_of((0, 0), size=size), mask_of((1, 1), (2, 1), size=size)]

    def of_both(**more):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return edit(pipe, size, generator=generators, **both, **more), specedit.report(pipe)

    specedit.install(pipe, method=RegionE(count=8))
    threshold = threshold_of(pipe, of_both)
    specedit.install(pipe, method=RegionE(count=8, threshold=threshold))
    for given in (False, True):
        more = dict(edit_mask=masks) if given else {}
        together, report = of_both(**more)
        edited = report.edit_mask.flatten(1)
        assert edited.any() and not edited.all() and not torch.equal(edited[0], edited[1])
        for row, seed in enumerate((5, 6)):
            one = {name: value[row] for name, value in (both | more).items()}
            alone = edit(pipe, size, generator=torch.Generator().manual_seed(seed), **one)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_qwen_with_both_guidance_branches(make_qwen, picture):
    pipe = make_qwen()
    call = dict(image=picture(128, 128), prompt="make it red", height=128, width=128, output_type="latent", **GUIDED)

    def run(**more):
        return pipe(generator=torch.Generator().manual_seed(0), **call, **more).images

    specedit.install(pipe, method=Steps(count=5))
    stock = run()
    specedit.install(pipe, method=RegionE(count=5, warmup=4, smooth=1))
    torch.testing.assert_close(run(), stock)
    specedit.install(pipe, method=RegionE(count=5, warmup=2, refresh=(), decay_threshold=0))
    assert run(edit_mask=mask_of((1, 1))).isfinite().all() and specedit.report(pipe).reused_steps == 2
    assert run().isfinite().all()


def test_keep_pixels_with_a_mask(pipe, edit, picture):
    specedit.install(pipe, method=RegionE(count=4), keep_pixels=True)
    image = edit(pipe, edit_mask=mask_of((0, 0)), output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    assert torch.equal(image[:, 64:, 64:], source[:, 64:, 64:])


def test_callbacks_see_every_step_and_may_interrupt(pipe, edit):
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append(tensors["latents"].shape)
        pipe._interrupt = index == 3

    specedit.install(pipe, method=RegionE(count=8))
    edit(pipe, callback_on_step_end=watch)
    assert seen == [(1, 64, 16)] * 4 and specedit.report(pipe).nfe == 4


def test_a_new_prompt_ends_what_is_cached(pipe, edit, count_calls, monkeypatch):
    monkeypatch.setattr(regione, "gamma_of", lambda adapter: (0.99,) * 9)

    def replace(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if index == 4 else {}

    calls = count_calls(pipe.transformer)
    specedit.install(pipe, method=RegionE(count=10, warmup=2, smooth=0, refresh=(), decay_threshold=1))
    for callback, expected in ((None, 2 + 1), (replace, 2 + 1 + 5)):
        calls.clear()
        names = ["prompt_embeds"]
        edit(pipe, edit_mask=mask_of((0, 0)), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert len(calls) == expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(count=0), ValueError, "^count: expected an integer of at least 1"),
        (dict(count=5, warmup=6), ValueError, "^warmup: expected an integer from 1 to 5 with count=5, or None, got 6"),
        (dict(smooth=28), ValueError, "^smooth: expected an integer from 0 to 27 with count=28"),
        (dict(smooth=1.5), TypeError, "^smooth: expected an integer"),
        (dict(count=5, warmup=4, smooth=2), ValueError, "^warmup, smooth: expected at most count=5 steps together"),
        (dict(refresh=16), TypeError, "^refresh: expected ascending integers from 8 to 25, no two of them adjacent"),
        (dict(refresh=(7,)), ValueError, "^refresh: expected ascending integers from 8 to 25"),
        (dict(refresh=(12, 13)), ValueError, "^refresh: expected ascending"),
        (dict(refresh=(26,)), ValueError, "^refresh: expected ascending"),
        (dict(threshold=1.5), ValueError, "^threshold: expected a number from -1 to 1, or None, got 1.5"),
        (dict(decay_threshold=-0.1), ValueError, "^decay_threshold: expected a number from 0 to 1, or None"),
        (dict(decay_threshold="no"), TypeError, "^decay_threshold: expected a number"),
    ],
)
def test_options_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        RegionE(**fields)

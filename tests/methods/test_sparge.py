"""SpargeAttention: which blocks it predicts, and whole runs."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.forward import flops_of
from specedit.method.sparse_blocks import BlockPredictor, kept_blocks, representatives
from specedit.method.trace import step_calls
from specedit.methods import Sparge, Steps
from specedit.models.flux import FluxKontext
from specedit.models.longcat import LongCatImageEdit
from specedit.models.qwen.edit import QwenImageEdit

GUIDED = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)
SIZES = (2, 2)


def of_blocks(*rows):
    """(1, N, 1, D) of rows (N, D)."""
    return torch.tensor(rows, dtype=torch.float32)[None, :, None]


# ------------------------------------------------------------------------------------------------------- unit truths


def test_representatives_by_hand():
    x = of_blocks([2.0, 0.0], [4.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -3.0])
    mean, similarity = representatives(x, 2)
    assert mean[0, 0].tolist() == [[3, 0], [0.5, 0.5], [0, -3]]  # the last block has one token
    # All pairs: equal directions 1; orthogonal ones (1 + 0 + 0 + 1) / 4.
    assert similarity[0, 0].tolist() == pytest.approx([1, 0.5, 1])


# Two query blocks and four key blocks whose compressed map is known: softmax of log p gives p.
def known_map():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.1, 0.15, 0.7]])
    queries = math.sqrt(2) * torch.eye(2)  # cancels the scale of attention
    logits = shares.log() - shares.log().mean(1, keepdim=True)  # keys are taken around their mean
    q = queries.repeat_interleave(2, 0)[None, :, None]
    k = logits.T.repeat_interleave(2, 0)[None, :, None]
    return q, k


def kept(theta=-1.0, **how):
    return kept_blocks(*known_map(), theta=theta, sizes=SIZES, **how)[0, 0].int().tolist()


def test_the_largest_blocks_up_to_tau_are_kept():
    assert kept(tau=0.75) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert kept(tau=0.81) == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert kept(tau=0.96) == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert kept(tau=0.4) == [[1, 0, 0, 0], [0, 0, 0, 1]]  # one at least
    assert kept(tau=1) == [[1] * 4] * 2


def test_a_share_of_the_blocks_may_be_kept():
    assert kept(top=0.5) == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert kept(top=0.1) == [[1, 0, 0, 0], [0, 0, 0, 1]] and kept(top=1) == [[1] * 4] * 2


def test_blocks_without_a_representative_are_always_computed():
    q, k = known_map()
    k = k.clone()
    k[0, 2:4, 0] = torch.tensor([[9.0, 0.0], [-9.0, 0.0]])  # the second key block points both ways
    mask = kept_blocks(q, k, theta=0.6, tau=0.2, sizes=SIZES)[0, 0]
    assert mask[:, 1].all() and mask.sum(1).tolist() == [2, 2]
    q = q.clone()
    q[0, :2, 0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # so does the first query block
    mask = kept_blocks(q, known_map()[1], theta=0.6, tau=0.2, sizes=SIZES)[0, 0]
    assert mask[0].all() and mask[1].sum() == 1
    assert kept_blocks(*known_map(), theta=1, tau=0.2, sizes=SIZES).all()


def rows_of(offsets, blocks):
    """The key blocks of every query block of one head."""
    return [blocks[a:b].tolist() for a, b in pairwise(offsets.tolist())]


def test_packed_sequences_are_predicted_one_by_one():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 700, 2, 8, generator=draw)
    ends = torch.tensor([0, 300, 700], dtype=torch.int32)
    packed, dense = BlockPredictor(-1, 0.5), BlockPredictor(-1, 0.5)
    keep = packed.packed(q, k, ends, ends)
    each = [dense.dense(q[None, part], k[None, part]) for part in (slice(0, 300), slice(300, 700))]
    for head in range(2):
        rows = [row for one in each for row in rows_of(one.offsets[0, head], one.blocks)]
        assert rows_of(keep.offsets[head], keep.blocks) == rows and len(rows) == 3 + 4
    assert packed.take_share() == dense.take_share() and not packed.pairs


def test_the_share_counts_short_blocks_as_they_are():
    predictor = BlockPredictor(theta=-1, top=0.5)
    q, k = torch.randn(2, 1, 150, 1, 8, generator=torch.Generator().manual_seed(0))
    keep = predictor.dense(q, k)
    rows, lengths = rows_of(keep.offsets[0, 0], keep.blocks), [64, 64, 22]
    pairs = sum(queries * lengths[j] for queries, row in zip((128, 22), rows, strict=True) for j in row)
    assert float(predictor.take_share()) == pytest.approx(pairs / 150**2)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("size", [(128, 128), (144, 112)])
def test_everything_kept_is_dense(pipe, edit, size):
    specedit.install(pipe, method=Steps(count=3), attention="torch")
    dense, flops = edit(pipe, size), specedit.report(pipe).flops
    for options in (Sparge(count=3, tau=1), Sparge(count=3, theta=1), Sparge(count=3, top=1)):
        specedit.install(pipe, method=options)
        assert torch.equal(edit(pipe, size), dense)
        assert specedit.report(pipe).flops == pytest.approx(flops, rel=1e-12)
    specedit.install(pipe, method=Steps(count=3))
    torch.testing.assert_close(edit(pipe, size), dense)


def test_skipped_blocks_are_not_counted(pipe, edit):
    specedit.install(pipe, method=Sparge(count=2, top=0.4, theta=-1))
    latents = edit(pipe)
    report = specedit.report(pipe)
    # 144 tokens: blocks of 128 and 16 queries, of 64, 64 and 16 keys. Every row keeps one block of keys.
    low, high = (
        2 * flops_of([dataclasses.replace(call, keys=keys)], pipe.transformer.config)
        for call in step_calls("", [16], 64, 64, samples=1, trims=True)
        for keys in (16, 64)
    )
    assert low < report.flops < high
    specedit.install(pipe, method=Steps(count=2))
    dense = edit(pipe)
    assert specedit.report(pipe).flops > high and not torch.equal(latents, dense)
    assert report.edit_mask is None and report.nfe == 2


def test_it_runs_at_the_calls_steps_and_keeps_pixels(pipe, edit, picture):
    mask = torch.zeros(128, 128)
    mask[:32, :32] = 1
    specedit.install(pipe, method="sparge", keep_pixels=True)
    image = edit(pipe, edit_mask=mask, num_inference_steps=2, output_type="pt")[0]
    source = torch.tensor(np.asarray(picture(128, 128))).permute(2, 0, 1) / 255
    assert torch.equal(image[:, 64:, 64:], source[:, 64:, 64:]) and specedit.report(pipe).nfe == 2
    assert specedit.SpecEditConfig(method="sparge").nfe == 50


def test_samples_of_a_batch_are_independent(pipe, edit, picture):
    both = dict(image=[picture(seed=i) for i in range(2)], prompt=["red", "make it large"])
    specedit.install(pipe, method=Sparge(count=2, top=0.4, theta=-1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    together = edit(pipe, generator=generators, **both)
    for row, seed in enumerate((5, 6)):
        one = {name: value[row] for name, value in both.items()}
        alone = edit(pipe, generator=torch.Generator().manual_seed(seed), **one)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_qwen_with_both_guidance_branches(make_qwen, picture):
    pipe = make_qwen()
    call = dict(image=picture(128, 128), prompt="make it red", height=128, width=128, output_type="latent", **GUIDED)
    runs = []
    for options in (Steps(count=2), Sparge(count=2, tau=1), Sparge(count=2, top=0.4, theta=-1)):
        specedit.install(pipe, method=options)
        runs.append((pipe(generator=torch.Generator().manual_seed(0), **call).images, specedit.report(pipe).flops))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert runs[1][1] == pytest.approx(runs[0][1]) and runs[2][1] < runs[0][1]
    assert runs[2][0].isfinite().all() and not torch.equal(runs[2][0], runs[0][0])


def test_an_interrupt_stops_it(pipe, edit):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True

    specedit.install(pipe, method=Sparge(count=3, tau=1))
    edit(pipe, callback_on_step_end=stop)
    stopped = specedit.report(pipe)
    specedit.install(pipe, method=Steps(count=1))
    edit(pipe)
    assert stopped.nfe == 1 and stopped.flops == pytest.approx(specedit.report(pipe).flops)


def test_published_settings():
    assert Sparge.at("default") == Sparge(theta=0.6, tau=0.98)
    assert Sparge.at("top-0.5") == Sparge(theta=-0.1, top=0.5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(count=0), ValueError, "^count: expected an integer of at least 1"),
        (dict(theta=2), ValueError, "^theta: expected a number from -1 to 1, got 2"),
        (dict(tau=0), ValueError, "^tau: expected a number above 0, at most 1, got 0"),
        (dict(top=1.5), ValueError, "^top: expected a number above 0, at most 1, got 1.5"),
        (dict(top=0.5, tau=0.9), ValueError, r"^tau: expected the default, 0.98, with top=0.5, got 0.9"),
        (dict(theta="high"), TypeError, "^theta: expected a number"),
    ],
)
def test_options_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Sparge(**fields)


def test_what_it_cannot_run_on_is_refused_before_any_work(pipe, edit, monkeypatch):
    with pytest.raises(ValueError, match=r"^attention: expected .* with method='sparge'"):
        specedit.install(pipe, method="sparge", attention="stock")
    with pytest.raises(ValueError, match=r"^attention: .* which skips blocks of keys, got 'merged'"):
        specedit.install(pipe, method="sparge", attention="merged")
    specedit.install(pipe, method="sparge")
    with pytest.raises(ValueError, match=r"^edit_mask: expected none with method='sparge'"):
        edit(pipe, edit_mask=torch.ones(128, 128))
    assert all(adapter.skips_blocks for adapter in (FluxKontext, QwenImageEdit, LongCatImageEdit))
    monkeypatch.setattr(FluxKontext, "skips_blocks", False)
    with pytest.raises(ValueError, match=r"^method: expected another one .* takes no lists of attention blocks"):
        specedit.install(pipe, method="sparge")

"""Fresco: its selection, its one noise field, and its ablations."""

import pytest
import torch

import specedit
from specedit import flops
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid
from specedit.method.expand import coarsen_noise
from specedit.method.groups import start_tokens
from specedit.methods import Fresco
from specedit.methods.fresco import temporal_variance, transition
from tests.methods import oracle

FLUX = dict(num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128)
packed_and_not = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])
GRIDS = pytest.mark.parametrize("shape", [(8, 12), (7, 9)], ids=str)


@pytest.mark.parametrize(("setting", "text", "reported"), [("30", 512, 2.87), ("18", 512, 4.72), ("9", 256, 10.27)])
def test_settings_cost_what_the_paper_reports(setting, text, reported):
    """Of text-to-image at 1024 px, against 50 steps of FLUX.1-dev."""
    method = Fresco.at(setting)
    mixed = 1024 + 3 * int(method.early * 1024)
    own = sum(
        steps * flops.transformer_flops(FLUX, text + tokens)
        for steps, tokens in zip(method.steps, (1024, mixed, 4096), strict=True)
    )
    assert 50 * flops.transformer_flops(FLUX, 512 + 4096) / own == pytest.approx(reported, rel=0.02)


def test_the_variance_is_over_steps():
    states = [torch.tensor([[[0.0, 1.0], [2.0, 2.0]]]), torch.tensor([[[2.0, 1.0], [2.0, 2.0]]])]
    assert temporal_variance(states).tolist() == [[0.5, 0]]


def test_converged_cells_are_promoted_first(pipe, edit, monkeypatch):
    """Tokens whose velocity is small vary least."""
    from specedit.models.flux import FluxKontext

    speeds = []

    def velocity(self, run, group, sigma):
        speed = torch.arange(group.tokens.shape[1], dtype=torch.float32).flip(0)
        speeds.append(speed)
        return speed[None, :, None].expand_as(group.tokens)

    monkeypatch.setattr(FluxKontext, "velocity", velocity)
    specedit.install(pipe, method=Fresco((3, 1, 1), early=0.25))
    edit(pipe)
    report = specedit.report(pipe)
    assert report.expand_mask.flatten().nonzero().flatten().tolist() == [12, 13, 14, 15]  # the slowest four of 16
    score = report.score[0, ::2, ::2].flatten()
    assert torch.equal(score.argsort(descending=True), torch.arange(16))


def test_random_selection_does_not_look(pipe, edit):
    masks, scores = [], []
    for select in ("variance", "random"):
        specedit.install(pipe, method=Fresco((2, 1, 1), select=select))
        for seed in range(2):
            edit(pipe, seed=seed)
            masks.append(specedit.report(pipe).expand_mask)
            scores.append(specedit.report(pipe).score)
            assert masks[-1].sum() == int(0.45 * 16)
    assert not torch.equal(masks[2], masks[3]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(scores[0], scores[2]) and torch.equal(scores[1], scores[3])  # the report shows the variance


@packed_and_not
@GRIDS
def test_one_noise_field_at_every_resolution(geometry, shape):
    """Of an empty picture, every state is the call's own noise on its layout: the field's, whatever came before."""
    run = oracle.make_run(Fresco((2, 2, 2)), shape, geometry, samples=1)
    oracle.edit(run)
    layouts = [layout for layout, *_ in run.adapter.seen]
    assert layouts[0].is_coarse and layouts[2].is_mixed and layouts[-1].is_fine
    for layout, tokens, sigma in run.adapter.seen:
        torch.testing.assert_close(tokens, sigma * start_tokens(run.state.noise, layout), rtol=1e-4, atol=1e-4)


def moved(geometry, shape, sigma=0.7, **options):
    """A state of a smooth picture that holds the field's noise, split in part; and what it should become."""
    grid = TokenGrid(*shape, geometry)
    old = MixedLayout.all_coarse(grid)
    new = MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    noise, fresh = (torch.randn(1, grid.tokens, 8, generator=torch.Generator().manual_seed(s)).double() for s in (2, 3))
    flat = torch.full((1, old.tokens, 8), 0.5, dtype=torch.float64)
    tokens = (1 - sigma) * flat + sigma * coarsen_noise(noise, grid)
    used = noise if options.get("same_field", True) else fresh
    target = 2 * sigma / (1 + sigma)
    path = (1 - target) * 0.5 + target * start_tokens(noise, new)
    return transition(tokens, old, new, sigma, used, **options), path


@packed_and_not
@GRIDS
def test_the_unified_field_stays_on_the_path(geometry, shape):
    """Proposition 1: with one field a change of resolution moves along the path; fresh noise leaves it."""
    tokens, path = moved(geometry, shape)
    torch.testing.assert_close(tokens, path)
    tokens, path = moved(geometry, shape, same_field=False)
    assert float((tokens - path).pow(2).mean()) > 0.3


def test_hadamard_children_hold_white_noise_and_interpolated_ones_do_not():
    """Covariance of a cell's noise over s'^2: I, against 3/4 on the diagonal and 1/2 off it."""
    grid, sigma = TokenGrid(2, 2, UNPACKED), 0.7
    coarse, fine = MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid)

    def covariance(**options):
        noises = torch.eye(4, dtype=torch.float64)[:, :, None]  # a sample for each column of the linear map
        tokens = sigma * coarsen_noise(noises, grid)
        columns = transition(tokens, coarse, fine, sigma, noises, **options)[..., 0] * (1 + sigma) / (2 * sigma)
        return columns.T @ columns

    one = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance(), one)
    torch.testing.assert_close(covariance(hadamard=False), 0.25 * one + 0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=(7, 6, 0)), ValueError, r"^steps: expected three integers of at least 1"),
        (dict(boundaries=(0.5, 0.9)), ValueError, r"^boundaries: expected two sigmas"),
        (dict(early=0), ValueError, r"^early: expected a number above 0"),
        (dict(early="some"), TypeError, r"^early: expected a number above 0"),
        (
            dict(select="varianze"),
            ValueError,
            r"^select: expected 'variance', 'edges' or 'random', .*did you mean 'variance'",
        ),
        (dict(noise=None), ValueError, r"^noise: expected 'unified' or 'fresh', got None"),
        (dict(expansion="nearest"), ValueError, r"^expansion: expected 'hadamard' or 'interpolated', got 'nearest'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Fresco(**options)


def test_every_ablation_runs(pipe, edit):
    pictures = []
    ablations = (dict(noise="fresh"), dict(expansion="interpolated"), dict(select="random"), dict(select="edges"))
    for options in ({}, *ablations):
        specedit.install(pipe, method=Fresco((1, 1, 1), **options))
        pictures.append(edit(pipe))
        assert pictures[-1].isfinite().all()
    assert all(not torch.equal(pictures[0], other) for other in pictures[1:])

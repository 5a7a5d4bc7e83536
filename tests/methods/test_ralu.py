"""RALU: its constants, its transition and its selection against the published formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import specedit
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid
from specedit.methods import Fresco, Ralu
from specedit.methods.ralu import decorrelating, raised, transition

SETTINGS = ("4x", "5x", "7x")


def test_the_published_settings():
    assert Ralu.at("4x") == Ralu()
    assert Ralu() == Ralu((5, 6, 7), (0.3, 0.45), (5.019, 2.589, 2.226), 6.317, 0.3) and Ralu().nfe == 18
    assert Ralu.at("5x") == Ralu((4, 5, 6), (0.3, 0.45), (5.12, 2.64, 2.25), 1 / math.sqrt(0.0177), 0.2)
    assert Ralu.at("7x") == Ralu((2, 3, 5), (0.2, 0.3), (8.141, 2.856, 2.193), 6.261, 0.1) and Ralu.at("7x").nfe == 10


@pytest.mark.parametrize("setting", SETTINGS)
def test_stages_start_where_the_paper_says(setting):
    method = Ralu.at(setting)
    starts = [method.sigmas(stage)[0] for stage in range(3)]
    # Eq. 7: s' = e / (delta + e) with delta = (1 - e) / sqrt(c), z = 1 / sqrt(c); sigma = 1 - s'.
    expected = [1, *(1 - e / (method.z * (1 - e) + e) for e in method.ends)]
    assert starts == pytest.approx(expected)
    assert [method.sigmas(stage)[-1] for stage in range(3)] == [1 - method.ends[0], 1 - method.ends[1], 0]


def test_4x_starts_by_hand():
    # 0.3 / (6.317 * 0.7 + 0.3) = 0.3 / 4.7219 and 0.45 / (6.317 * 0.55 + 0.45) = 0.45 / 3.92435
    assert 1 - raised(0.7, 6.317) == pytest.approx(0.0635337, rel=1e-5)
    assert 1 - raised(0.55, 6.317) == pytest.approx(0.1146687, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sigmas_are_uniform_before_the_shift(stage):
    method = Ralu()
    sigmas, h = np.array(method.sigmas(stage)), method.shifts[stage]
    assert len(sigmas) == method.steps[stage] + 1
    uniform = sigmas / (h - (h - 1) * sigmas)  # the inverse that the code's denoising loop starts with
    np.testing.assert_allclose(np.diff(uniform), (uniform[-1] - uniform[0]) / method.steps[stage])


@pytest.mark.parametrize("setting", SETTINGS)
def test_shifts_and_z_match_the_timestep_distribution(setting):
    """Eq. 8 to 10: no small change of h or z brings the stages' timesteps nearer to the model's own, of shift 3."""
    method = Ralu.at(setting)
    e, t = (*method.ends, 1.0), np.linspace(0, 1, 1000)

    def density(h, s, end):
        def cdf(x):
            return h * x / (1 + (h - 1) * x)

        return np.where((t >= s) & (t <= end), h / (1 + (h - 1) * t) ** 2 / (cdf(end) - cdf(s)), 0)

    def divergence(parameters):
        *h, z = parameters
        s = [0.0, *(end / (z * (1 - end) + end) for end in e[:2])]
        wanted = density(3, 0, 1) + sum((e[k] - s[k + 1]) * density(3, s[k + 1], e[k]) for k in (0, 1))
        taken = sum(n * density(h[k], s[k], e[k]) for k, n in enumerate(method.steps))
        p, q = wanted / wanted.sum() + 1e-12, taken / taken.sum() + 1e-12
        m = (p + q) / 2
        return (p * np.log(p / m) + q * np.log(q / m)).sum()

    best = np.array([*method.shifts, method.z])
    for i in range(4):
        for factor in (0.8, 1.25):
            other = best.copy()
            other[i] *= factor
            assert divergence(best) < divergence(other)


def linear(function, size):
    """The matrix of a linear function of `size` numbers."""
    return torch.stack([function(row) for row in torch.eye(size, dtype=torch.float64)], -1)


@pytest.mark.parametrize("z", [6.317, 6.261, 2.0])
@pytest.mark.parametrize("sigma", [0.7, 0.55])
@pytest.mark.parametrize(
    "grid", [TokenGrid(4, 6), TokenGrid(5, 3), TokenGrid(4, 4, UNPACKED), TokenGrid(5, 3, UNPACKED)], ids=str
)
def test_after_a_transition_the_state_is_the_flows_at_the_new_time(grid, sigma, z):
    """Mean (1 - s') x0 and covariance s'^2 I, of cells that are split, stay coarse, and were split before."""
    cells, channels = grid.coarse().shape, grid.geometry.pixels
    before, after = torch.zeros(cells, dtype=torch.bool), torch.zeros(cells, dtype=torch.bool)
    before[0, 0] = after[0, 0] = after[1, 0] = after[-1, -1] = True
    old, new, target = MixedLayout(grid, before), MixedLayout(grid, after), raised(sigma, z)
    silent = torch.zeros(1, grid.tokens, channels, dtype=torch.float64)

    def of_tokens(x):
        return transition(x.view(1, old.tokens, channels), old, new, sigma, z, silent).flatten()

    def of_noise(n):
        still = torch.zeros(1, old.tokens, channels, dtype=torch.float64)
        return transition(still, old, new, sigma, z, n.view(1, grid.tokens, channels)).flatten()

    carried, added = linear(of_tokens, old.tokens * channels), linear(of_noise, grid.tokens * channels)
    flat = torch.ones(old.tokens * channels, dtype=torch.float64)
    torch.testing.assert_close(carried @ flat * (1 - sigma), torch.full_like(carried[:, 0], 1 - target))
    covariance = sigma**2 * carried @ carried.T + added @ added.T
    # Beyond an odd side coarse tokens hold pixels that the picture lacks, whose noise repeats the first row's.
    whole_tokens = (new.area == 4) | (torch.arange(new.tokens) >= len(new.locked_cells))
    keep = whole_tokens.repeat_interleave(channels)
    whole = covariance[keep][:, keep]
    torch.testing.assert_close(whole, target**2 * torch.eye(len(whole), dtype=torch.float64))


@pytest.mark.parametrize("geometry", [PACKED, UNPACKED])
def test_added_noise_has_the_published_covariance(geometry):
    grid, c = TokenGrid(2, 2, geometry), 1 / 6.317**2
    size = 4 * geometry.pixels
    matrix = linear(lambda n: decorrelating(n.view(1, 4, geometry.pixels), grid, c).flatten(), size)
    blocks = torch.block_diag(*[torch.ones(4, 4, dtype=torch.float64)] * geometry.pixels)
    if geometry is UNPACKED:
        blocks = torch.ones(4, 4, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64) - c * blocks)


def finding(monkeypatch, square):
    """The tokens in which edges are looked for: their picture is black, or with one white square."""
    from specedit.models.flux import FluxKontext

    stock, found = FluxKontext.decode, []

    def decode(self, pipe, state, tokens, output_type):
        if output_type != "pt" or state.grid.tokens != 16:
            return stock(self, pipe, state, tokens, output_type)
        found.append(tokens)
        image = torch.zeros(1, 3, 64, 64)
        image[..., 20:28, 20:28] = float(square)
        return image

    monkeypatch.setattr(FluxKontext, "decode", decode)
    return found


@pytest.mark.parametrize(
    "method", [Ralu((1, 1, 1), early=1 / 16), Fresco((1, 1, 1), early=1 / 16, select="edges")], ids=lambda m: m.name
)
def test_it_splits_the_cells_with_most_edges(pipe, edit, monkeypatch, method):
    """One square in the decoded prediction, whose outline is what is split."""
    from specedit.models.flux import FluxKontext

    found = finding(monkeypatch, square=True)
    # What is predicted is nothing, of whatever noise.
    monkeypatch.setattr(FluxKontext, "velocity", lambda self, run, group, sigma: group.tokens / sigma)
    specedit.install(pipe, method=method)
    edit(pipe)
    report = specedit.report(pipe)
    assert report.expand_mask.nonzero().tolist() == [[0, 1, 1]]
    score = report.score[0, ::2, ::2]
    assert report.score.shape == (1, 8, 8) and score[1, 1] > 0 and score.count_nonzero() == 1
    (tokens,) = found
    assert tokens.shape[1] == 16 and tokens.abs().max() < 1e-4


@pytest.mark.parametrize("method", [Ralu((1, 1, 1)), Fresco((1, 1, 1), select="edges")], ids=lambda m: m.name)
def test_cells_with_equally_many_edges_are_split_by_chance(pipe, edit, monkeypatch, method):
    finding(monkeypatch, square=False)
    specedit.install(pipe, method=method)
    masks = []
    for seed in (0, 1, 0):
        edit(pipe, seed=seed)
        masks.append(specedit.report(pipe).expand_mask)
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_the_share_that_is_split_early(pipe, edit):
    specedit.install(pipe, method=Ralu((1, 1, 1)))
    edit(pipe)
    assert specedit.report(pipe).expand_mask.sum() == int(0.3 * 16)


def test_the_mixed_stage_keeps_the_coarse_positions(pipe, edit, monkeypatch):
    from specedit.methods import ralu

    seen = []
    monkeypatch.setattr(ralu, "run_stage", lambda run, name, groups, **more: seen.append((name, groups)))
    monkeypatch.setattr(ralu.resolution, "edge_shares", lambda run, group: torch.arange(16.0).view(1, 4, 4))
    specedit.install(pipe, method=Ralu(early=1 / 16))
    edit(pipe)
    layouts = {name: groups[0].layout for name, groups in seen}
    grid = layouts["coarse"].positions
    assert grid.max() == 3
    assert torch.equal(layouts["mixed"].positions[:15], grid[:15])
    assert layouts["mixed"].positions[15:].tolist() == [[3, 3], [3, 3.5], [3.5, 3], [3.5, 3.5]]
    assert layouts["full"].positions.max() == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=(5, 6)), ValueError, r"^steps: expected three integers of at least 1, .* got 2 values"),
        (dict(steps=(5, 0, 7)), ValueError, r"^steps: expected three integers of at least 1, .* got 0"),
        (dict(steps=18), TypeError, r"^steps: expected three integers"),
        (dict(ends=(0.3, 1.0)), ValueError, r"^ends: expected two numbers .* got \(0.3, 1.0\)"),
        (dict(ends=(0.9, 0.1)), ValueError, r"^ends: expected two numbers .* got \(0.9, 0.1\)"),
        (dict(ends=(0.3, None)), TypeError, r"^ends: expected two numbers"),
        (dict(shifts=(1, 2)), ValueError, r"^shifts: expected three numbers above 0, got 2 values"),
        (dict(shifts=(1, 2, 0)), ValueError, r"^shifts: expected three numbers above 0, got 0"),
        (dict(z=1.9), ValueError, r"^z: expected a number of at least 2, got 1.9"),
        (dict(z=float("nan")), ValueError, r"^z: expected a number of at least 2, got nan"),
        (dict(early=0), ValueError, r"^early: expected a number above 0, at most 1, got 0"),
        (dict(early=1.5), ValueError, r"^early: expected a number above 0, at most 1, got 1.5"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Ralu(**options)


def test_steps_of_a_call_keep_the_proportions():
    assert Ralu().with_steps(36) == dataclasses.replace(Ralu(), steps=(10, 12, 14))
    assert Ralu().with_steps(3).steps == (1, 1, 1)

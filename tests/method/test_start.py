"""The start from a noised picture: derived anew from x_s = (1 - s) x0 + s e, and the noise measured."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from specedit.config import SpecEditConfig
from specedit.field_checks import first_step
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid, mean_pixels
from specedit.method.adapter import EditState
from specedit.method.cells import CellMasks
from specedit.method.expand import cell_detail, refine_layout
from specedit.method.groups import detail_share, first_tokens
from specedit.method.schedule import Stage, contracted_sigma, expanded_sigma, stages

CHANNELS = 8
sigmas = st.floats(0.05, 0.95)
grids = st.builds(TokenGrid, st.integers(1, 7), st.integers(1, 7), st.sampled_from([PACKED, UNPACKED]))
few = settings(max_examples=25)


def state_of(grid, start, noise=None, samples=1):
    draw = torch.Generator().manual_seed(0)
    picture = torch.randn(samples, grid.tokens, CHANNELS, generator=draw)
    noise = torch.randn(samples, grid.tokens, CHANNELS, generator=draw) if noise is None else noise
    return EditState(
        grid=grid, noise=noise, reference=picture, reference_grid=grid, generator=None, text_tokens=0, branches=1,
        pixels_per_token=16, start=start,
    )  # fmt: skip


def stock_start(state):
    """What the stock pipelines start from: `scale_noise` of the picture."""
    return (1 - state.start) * state.reference + state.start * state.noise


@few
@given(sigmas)
def test_contracting_undoes_expanding(sigma):
    assert contracted_sigma(expanded_sigma(sigma)) == pytest.approx(sigma)
    assert contracted_sigma(1.0) == 1.0


@few
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([PACKED, UNPACKED]), sigmas)
def test_coarse_tokens_are_those_of_stocks_start_contracted(h, w, geometry, sigma):
    """The mean of four pixels of (1-s) x0 + s e has noise s/2. Times k = 2/(2-s) it is s' of white noise and 1-s' of
    the picture's mean, because k s / 2 = s / (2-s) = s' and k (1-s) = 1-s'."""
    grid = TokenGrid(2 * h, 2 * w, geometry)
    state = state_of(grid, sigma)
    coarse = first_tokens(state, slice(None), MixedLayout.all_coarse(grid), contracted_sigma(sigma))
    image = geometry.to_image(stock_start(state), grid.shape)
    means = torch.nn.functional.avg_pool2d(image, 2)
    torch.testing.assert_close(coarse, 2 / (2 - sigma) * geometry.from_image(means), rtol=1e-4, atol=1e-5)


@few
@given(grids, sigmas)
def test_fine_tokens_are_stocks_start(grid, sigma):
    state = state_of(grid, sigma)
    layout = MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    tokens = first_tokens(state, slice(None), layout, sigma)
    fine = tokens[:, len(layout.locked_cells) :]
    torch.testing.assert_close(fine, stock_start(state)[:, layout.fine_tokens])


@few
@given(grids, sigmas)
def test_a_coarse_stage_of_no_length_gives_stocks_start(grid, sigma):
    """What is coarse at the start and then expanded, detail and all, is what stock starts from."""
    state, coarse = state_of(grid, sigma), MixedLayout.all_coarse(grid)
    start = contracted_sigma(sigma)
    changes = torch.zeros(1, *grid.coarse().shape, dtype=torch.bool)
    cells = CellMasks(~changes, ~changes, ~changes, known_unchanged=changes)
    share = detail_share(state, cells, Stage("mixed", sigma, 0.0, 1))
    tokens, level = refine_layout(
        first_tokens(state, slice(None), coarse, start), coarse, MixedLayout.all_fine(grid), start,
        split_noise=state.split_noise, fresh_noise=state.noise,
        known_detail=state.reference_detail * share[:, :, None, None, None],
    )  # fmt: skip
    assert level == pytest.approx(sigma) and torch.allclose(share, torch.ones_like(share))
    inside = grid.coarse().height * 2 == grid.height and grid.coarse().width * 2 == grid.width
    if inside:  # beyond an odd side picture and noise are continued differently
        torch.testing.assert_close(tokens, stock_start(state), rtol=1e-3, atol=1e-4)
    assert tokens.shape == state.noise.shape and torch.isfinite(tokens).all()


@pytest.mark.parametrize("start", [0.97, 0.8])
@pytest.mark.parametrize("grid", [TokenGrid(4, 4), TokenGrid(3, 5), TokenGrid(3, 5, UNPACKED)], ids=str)
def test_mean_and_noise_at_the_start_and_after_expansion(start, grid):
    """Over many draws: the mean is (1-s) times the picture, or its mean, and the noise white of deviation s."""
    n = 4000
    noise = torch.randn(n, grid.tokens, CHANNELS, generator=torch.Generator().manual_seed(2))
    state = state_of(grid, start, noise)
    state.reference = state.reference.expand(n, -1, -1)
    coarse, level = MixedLayout.all_coarse(grid), contracted_sigma(start)
    tokens = first_tokens(state, slice(None), coarse, level)
    pixels = mean_pixels(state.reference[:1], grid)
    assert (tokens.mean(0) - (1 - level) * pixels[0]).abs().max() < 6 * level / n**0.5
    assert (tokens.std(0) / level - 1).abs().max() < 0.06

    ended = 0.6  # of the coarse stage, whose prediction is that of the start: the clean picture's mean
    moved = (1 - ended) * pixels + ended * (tokens - (1 - level) * pixels) / level
    after = expanded_sigma(ended)
    changes = torch.zeros(n, *grid.coarse().shape, dtype=torch.bool)
    share = detail_share(state, CellMasks(~changes, ~changes, ~changes, changes), Stage("mixed", after, 0.0, 1))
    fine, _ = refine_layout(
        moved, coarse, MixedLayout.all_fine(grid), ended, split_noise=state.split_noise, fresh_noise=noise,
        known_detail=state.reference_detail * share[:, :, None, None, None],
    )  # fmt: skip
    assert (fine.std(0) / after - 1).abs().max() < 0.06
    detail = cell_detail(fine.mean(0, keepdim=True), grid)
    expected = (1 - start) * cell_detail(state.reference[:1], grid)
    even = grid.height % 2 == grid.width % 2 == 0
    if even:
        assert (detail - expected).abs().max() < 8 * after / n**0.5


def test_a_run_from_noise_has_no_detail_of_what_changes():
    state = state_of(TokenGrid(4, 4), 1.0)
    changes = torch.tensor([[[True, False], [False, False]]])
    share = detail_share(state, CellMasks(changes, changes, changes, ~changes), Stage("mixed", 0.8, 0.0, 1))
    assert torch.equal(share, (~changes).flatten(1).float())


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (1.0, [("coarse", 1.0, 0.7, 2), ("mixed", 1.4 / 1.7, 0.4, 3), ("full", 0.8 / 1.4, 0.0, 4)]),
        (0.9, [("coarse", 0.9 / 1.1, 0.7, 2), ("mixed", 1.4 / 1.7, 0.4, 3), ("full", 0.8 / 1.4, 0.0, 4)]),
        (1.4 / 1.7, [("mixed", 1.4 / 1.7, 0.4, 5), ("full", 0.8 / 1.4, 0.0, 4)]),
        (0.6, [("mixed", 0.6, 0.4, 5), ("full", 0.8 / 1.4, 0.0, 4)]),
        (0.5, [("full", 0.5, 0.0, 9)]),
    ],
)
def test_stages_of_a_start(start, expected):
    found = stages(SpecEditConfig(steps=(2, 3, 4), boundaries=(0.7, 0.4)), start)
    assert [(s.name, s.steps) for s in found] == [(name, steps) for name, _, _, steps in expected]
    for stage, (_, begin, end, _) in zip(found, expected, strict=True):
        assert (stage.start, stage.end) == pytest.approx((begin, end))


@pytest.mark.parametrize("start", [1.0, 0.9, 0.6, 0.3, 0.05])
@pytest.mark.parametrize("restore", ["full", "reference", "pixels"])
def test_no_stage_begins_above_the_start(start, restore):
    for stage in stages(SpecEditConfig(restore=restore), start):
        assert stage.end < stage.start
        assert (expanded_sigma(stage.start) if stage.name == "coarse" else stage.start) <= start + 1e-9


@few
@given(st.integers(1, 60), st.floats(0.01, 1.0))
def test_steps_are_cut_as_the_stock_pipelines_do(n, strength):
    pipe = FluxKontextInpaintPipeline.__new__(FluxKontextInpaintPipeline)
    vars(pipe)["scheduler"] = scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(n)
    _, left = pipe.get_timesteps(n, strength, None)
    assert left == n - first_step(n, strength) >= 1


def test_the_first_stages_lose_their_steps_first():
    config = SpecEditConfig(steps=(7, 6, 5))
    assert config.with_strength(1.0) is config
    assert config.with_strength(0.8).steps == (4, 6, 5)
    assert config.with_strength(0.5).steps == (0, 4, 5)
    assert config.with_strength(0.01).steps == (0, 0, 1)
    assert SpecEditConfig(steps=(2, 2, 5), draft_steps=0, restore="reference").with_strength(0.5).steps == (0, 0, 5)
    with pytest.raises(ValueError, match=r"strength: expected 1 with method='steps', got 0\.5"):
        SpecEditConfig(method="steps").with_strength(0.5)

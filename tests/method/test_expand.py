"""States between resolutions: the algebra derived anew from x_s = (1 - s) x0 + s e, and the noise measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid, mean_pixels, repeat_pixels
from specedit.method.expand import cell_detail, coarsen_noise, haar, refine_layout, renoise
from specedit_kernels import contract_tokens

CHANNELS = 8  # of a token: two latent channels if packed, eight if not
# Rows: the sum, and the details left-right, top-bottom and diagonal, over pixels 00, 01, 10, 11.
HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0

sigmas = st.floats(0.05, 0.95)
geometries = st.sampled_from([PACKED, UNPACKED])
grids = st.builds(TokenGrid, st.integers(1, 7), st.integers(1, 7), geometries)
few = settings(max_examples=25)
both = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def detail_shape(grid, batch=1):
    return batch, grid.coarse().tokens, *((4, CHANNELS // 4, 3) if grid.geometry == PACKED else (1, CHANNELS, 3))


def zero_noise(grid, batch=1):
    split = torch.zeros(detail_shape(grid, batch))
    return dict(split_noise=split, fresh_noise=torch.zeros(batch, grid.tokens, CHANNELS))


def pixels_of(cells, grid):
    """Coarse tokens (B, M, C) as the pixels (B, M, pixels, channels) whose blocks they stand for."""
    return cells.unflatten(-1, (-1, 4)).transpose(2, 3) if grid.geometry == PACKED else cells[:, :, None]


def arranged(blocks, grid):
    """Blocks (B, M, pixels, channels, 4) as the children (B, 4 * M, C) of all cells."""
    b = blocks.shape[0]
    return (blocks if grid.geometry == PACKED else blocks[:, :, 0].transpose(2, 3)).reshape(b, -1, CHANNELS)


def some_layout(grid, seed):
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(seed)) < 0.5)


def correlation(samples):
    """Largest correlation between two different columns of (n, k) samples."""
    off = torch.corrcoef(samples.T) - torch.eye(samples.shape[1])
    return off.abs().max().item()


def test_haar_is_orthonormal():
    tokens = normal(3, 5, CHANNELS)
    total, detail = haar(tokens.view(3, 5, -1, 4))
    coefficients = torch.cat([total[..., None], detail], -1)
    torch.testing.assert_close(coefficients, tokens.view(3, 5, -1, 4) @ HADAMARD.T)
    torch.testing.assert_close(coefficients @ HADAMARD, tokens.view(3, 5, -1, 4))


@few
@given(grids, sigmas)
def test_expansion_is_the_hadamard_formula(grid, sigma):
    cells = grid.coarse()
    z, noise = normal(1, cells.tokens, CHANNELS), normal(*detail_shape(grid), seed=1)
    new = MixedLayout.all_fine(grid)
    tokens, after = refine_layout(
        z, MixedLayout.all_coarse(grid), new, sigma, **zero_noise(grid) | {"split_noise": noise}
    )
    assert after == pytest.approx(2 * sigma / (1 + sigma))
    # every pixel of the coarse token becomes a block: (z ± s n1 ± s n2 ± s n3) / (1 + s)
    signs = 2 * HADAMARD[1:]
    blocks = (pixels_of(z, grid)[..., None] + sigma * (noise @ signs)) / (1 + sigma)
    children = arranged(blocks, grid)[:, new.fine_slots]
    torch.testing.assert_close(tokens, children, rtol=1e-4, atol=1e-5)


@few
@given(st.integers(1, 4), st.integers(1, 4), sigmas, geometries)
def test_expand_then_contract_is_the_identity(rows, columns, sigma, geometry):
    grid = TokenGrid(2 * rows, 2 * columns, geometry)
    z = normal(2, grid.coarse().tokens, CHANNELS)
    noise = normal(*detail_shape(grid, 2), seed=1)
    tokens, after = refine_layout(
        z, MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid), sigma,
        split_noise=noise, fresh_noise=torch.zeros(2, grid.tokens, CHANNELS),
    )  # fmt: skip
    back, before = contract_tokens(tokens[:, grid.children()], after, patch=geometry.patch)
    torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-5)
    assert before == pytest.approx(sigma)


@both
@pytest.mark.parametrize("sigma", [0.2, 0.55, 0.9])
def test_child_noise_is_white(sigma, geometry):
    grid = TokenGrid(64, 64, geometry)
    cells = grid.coarse()
    content = normal(1, cells.tokens, CHANNELS, seed=5)
    coarse = (1 - sigma) * content + sigma * normal(1, cells.tokens, CHANNELS)
    tokens, after = refine_layout(
        coarse, MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid), sigma,
        split_noise=normal(*detail_shape(grid), seed=1), fresh_noise=normal(1, grid.tokens, CHANNELS),
    )  # fmt: skip
    clean = torch.zeros(1, grid.tokens, CHANNELS)
    clean[:, grid.children().flatten()] = repeat_pixels(content, geometry).flatten(1, 2)
    noise = (tokens - (1 - after) * clean)[0]
    # 32768 numbers: the standard deviation is known to 0.4 %, a correlation of 1024 blocks to 0.03 (one sigma)
    assert noise.std().item() == pytest.approx(after, rel=0.02)
    assert abs(noise.mean().item()) < 0.03 * after
    assert noise.std(0).sub(after).abs().max() < 0.06 * after
    blocks = noise[grid.children()].reshape(cells.tokens, -1)  # all pixels of a cell side by side
    assert correlation(blocks) < 0.16
    rows = noise.view(64, 64, CHANNELS)
    assert abs(torch.corrcoef(torch.stack([rows[:, 1:].flatten(), rows[:, :-1].flatten()]))[0, 1]) < 0.025


@both
def test_coarsened_noise_is_white(geometry):
    grid = TokenGrid(64, 64, geometry)
    coarse = coarsen_noise(normal(1, grid.tokens, CHANNELS), grid)[0]  # 8192 numbers
    assert coarse.std().item() == pytest.approx(1, rel=0.04)
    assert correlation(coarse) < 0.16
    pairs = coarse.view(-1, 2, CHANNELS).flatten(1)
    assert correlation(pairs) < 0.2


@few
@given(grids)
def test_coarsened_noise_is_exactly_white_inside_the_picture(grid):
    """Noise coarsens by a matrix with orthonormal rows: one row for each coarse pixel that lies in the picture."""
    pixels, cells, patch = grid.geometry.pixels, grid.coarse(), grid.geometry.patch
    basis = torch.eye(grid.tokens * pixels).view(-1, grid.tokens, pixels)  # one number of the noise at a time
    image = F.pixel_shuffle(coarsen_noise(basis, grid).transpose(1, 2).unflatten(2, cells.shape), patch)
    height, width = grid.shape if patch == 2 else cells.shape  # packed, a coarse pixel is as large as a fine token
    matrix = image[..., :height, :width].flatten(1).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(height * width))


@pytest.mark.parametrize("shape", [(47, 87), (63, 64)])
def test_coarsened_noise_of_an_odd_grid_is_white_inside_the_picture(shape):
    grid = TokenGrid(*shape)
    coarse = coarsen_noise(normal(4, grid.tokens, CHANNELS), grid).view(4, *grid.coarse().shape, CHANNELS // 4, 2, 2)
    assert coarse.std().item() == pytest.approx(1, rel=0.04)
    pixels = coarse.permute(0, 3, 1, 4, 2, 5).reshape(4 * CHANNELS // 4, 2 * grid.coarse().height, -1)
    inside = pixels[:, : grid.height, : grid.width]  # one pixel of a coarse token is one token of the grid
    assert inside.std().item() == pytest.approx(1, rel=0.04)
    rows, columns = inside.transpose(0, 1).flatten(1), inside.flatten(0, 1).T
    for first, last in ((rows[0], rows[-1]), (columns[0], columns[-1])):
        assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1]) < 0.2
    if grid.height % 2:
        assert torch.equal(pixels[:, grid.height, : grid.width], inside[:, 0])  # as the docstring says


@few
@given(grids)
def test_coarsened_noise_and_its_detail_hold_everything(grid):
    noise = normal(2, grid.tokens, CHANNELS)
    sums = pixels_of(coarsen_noise(noise, grid), grid)
    coefficients = torch.cat([sums[..., None], cell_detail(noise, grid, mode="circular")], -1)
    children = arranged(coefficients @ HADAMARD, grid)
    torch.testing.assert_close(children[:, MixedLayout.all_fine(grid).fine_slots], noise)


@few
@given(grids, sigmas, st.integers(0, 50))
def test_with_everything_expanded_the_noise_is_the_calls_own(grid, sigma, seed):
    """The coarse stage starts from the sum coefficients; expanded cells take the other three."""
    noise, content = normal(2, grid.tokens, CHANNELS), normal(2, grid.coarse().tokens, CHANNELS, seed=1)
    coarse, fine = MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid)
    state = (1 - sigma) * content + sigma * coarsen_noise(noise, grid)
    given_noise = dict(split_noise=cell_detail(noise, grid, mode="circular"), fresh_noise=torch.zeros_like(noise))
    tokens, after = refine_layout(state, coarse, fine, sigma, **given_noise)
    torch.testing.assert_close(tokens, (1 - after) * coarse.full_grid(content) + after * noise, rtol=1e-4, atol=1e-5)
    mixed = some_layout(grid, seed)
    some, level = refine_layout(state, coarse, mixed, sigma, **given_noise)
    own = some[:, len(mixed.locked_cells) :]
    assert level == after or torch.equal(mixed.expanded, coarse.expanded)
    torch.testing.assert_close(own, tokens[:, mixed.fine_tokens], rtol=1e-4, atol=1e-5)


@given(sigmas, st.floats(0, 1))
def test_renoise_keeps_signal_and_noise_summing_to_one(sigma, share):
    target = sigma + share * (1 - sigma)
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    signal = renoise((1 - sigma) * one, sigma, target, nothing).item()
    old = renoise(sigma * one, sigma, target, nothing).item()
    new = renoise(nothing, sigma, target, one).item()
    assert signal == pytest.approx(1 - target)
    assert math.hypot(old, new) == pytest.approx(target)


@given(sigmas)
def test_renoise_to_the_expanded_level(sigma):
    x, n = normal(4).double(), normal(4, seed=1).double()
    expected = (x + math.sqrt(3) * sigma * n) / (1 + sigma)
    torch.testing.assert_close(renoise(x, sigma, 2 * sigma / (1 + sigma), n), expected)


def test_renoise_only_adds_noise():
    x = normal(4)
    assert renoise(x, 1.0, 1.0, torch.ones(4)) is x
    with pytest.raises(ValueError, match=r"expected sigma <= target <= 1, got 0\.5 and 0\.4"):
        renoise(x, 0.5, 0.4, x)


@few
@given(grids, sigmas, st.integers(0, 50))
def test_without_noise_a_finer_layout_shows_the_same_content(grid, sigma, seed):
    coarse, mixed, fine = MixedLayout.all_coarse(grid), some_layout(grid, seed), MixedLayout.all_fine(grid)
    content = normal(1, grid.coarse().tokens, CHANNELS)
    picture = coarse.full_grid(content)
    state, level = (1 - sigma) * content, sigma
    for old, new in ((coarse, mixed), (mixed, fine)):
        state, level = refine_layout(state, old, new, level, **zero_noise(grid))
        torch.testing.assert_close(new.full_grid(state), (1 - level) * picture, rtol=1e-4, atol=1e-5)


@few
@given(grids, sigmas, st.integers(0, 50))
def test_known_detail_returns_with_its_share_of_signal(grid, sigma, seed):
    content = normal(1, grid.tokens, CHANNELS)
    mixed, fine = some_layout(grid, seed), MixedLayout.all_fine(grid)
    coarse = mean_pixels(content, grid)[:, mixed.locked_cells]
    state = (1 - sigma) * torch.cat([coarse, content[:, mixed.fine_tokens]], 1)
    tokens, after = refine_layout(
        state, mixed, fine, sigma, known_detail=cell_detail(content, grid), **zero_noise(grid)
    )
    if torch.equal(mixed.expanded, fine.expanded):
        assert after == sigma and tokens is state
    else:
        torch.testing.assert_close(tokens, (1 - after) * content, rtol=1e-4, atol=1e-5)


@few
@given(grids, st.integers(0, 50))
def test_known_detail_is_restored_at_sigma_0(grid, seed):
    content = normal(2, grid.tokens, CHANNELS)
    mixed, fine = some_layout(grid, seed), MixedLayout.all_fine(grid)
    noise = dict(split_noise=normal(*detail_shape(grid, 2)), fresh_noise=normal(2, grid.tokens, CHANNELS))
    tokens, after = refine_layout(
        mixed.from_full_grid(content), mixed, fine, 0.0, known_detail=cell_detail(content, grid), **noise
    )
    assert after == 0
    torch.testing.assert_close(tokens, content)


@both
def test_tokens_that_keep_their_resolution_are_renoised(geometry):
    grid, sigma = TokenGrid(64, 64, geometry), 0.6
    first = MixedLayout(grid, torch.arange(32).remainder(4).eq(0).expand(32, 32).clone())
    second = MixedLayout(grid, first.expanded | torch.arange(32).remainder(4).eq(1).expand(32, 32))
    state = sigma * normal(1, first.tokens, CHANNELS, seed=2)
    tokens, after = refine_layout(
        state, first, second, sigma,
        split_noise=normal(*detail_shape(grid)), fresh_noise=normal(1, grid.tokens, CHANNELS),
    )  # fmt: skip
    split = len(second.locked_cells)
    for part in (tokens[:, :split], tokens[:, split:]):  # cells that stay coarse; old and new fine tokens
        assert part.std().item() == pytest.approx(after, rel=0.04)
    on_grid = second.full_grid(tokens)[0]
    assert correlation(on_grid[second.fine_tokens]) < 0.16


def test_an_unchanged_layout_is_left_alone():
    layout = some_layout(TokenGrid(5, 4), 1)
    state = normal(1, layout.tokens, CHANNELS)
    same = MixedLayout(layout.grid, layout.expanded.clone())
    tokens, sigma = refine_layout(state, layout, same, 0.3, **zero_noise(layout.grid))
    assert tokens is state and sigma == 0.3


def test_a_split_cell_cannot_become_coarse():
    grid = TokenGrid(4, 4)
    with pytest.raises(ValueError, match="expected only finer cells"):
        refine_layout(
            normal(1, grid.tokens, CHANNELS), MixedLayout.all_fine(grid), MixedLayout.all_coarse(grid), 0.5,
            **zero_noise(grid),
        )  # fmt: skip

"""Grids and layouts against dense pictures and brute force, on even and odd sides."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from specedit.geometry import PACKED, UNPACKED
from specedit.layout import GridSet, MixedLayout, TokenGrid, cells_touched, mean_pixels, repeat_pixels

geometries = st.sampled_from([PACKED, UNPACKED])
grids = st.builds(TokenGrid, st.integers(1, 9), st.integers(1, 9), geometries)


@st.composite
def layouts(draw, grids=grids):
    grid = draw(grids)
    share, seed = draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])), draw(st.integers(0, 1000))
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(seed)) < share)


def random_tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def picture_of(tokens, grid):
    """Tokens (B, N, C) as latent pixels (B, C / patch^2, patch * height, patch * width)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid.shape), grid.geometry.patch)


def members(grid, i, j):
    """Fine tokens of cell (i, j)."""
    rows, columns = (range(2 * k, min(2 * k + 2, side)) for k, side in ((i, grid.height), (j, grid.width)))
    return [(r, c) for r in rows for c in columns]


@given(grids)
def test_coarse_grid_covers_every_token(grid):
    cells = grid.coarse()
    listed = [token for i in range(cells.height) for j in range(cells.width) for token in members(grid, i, j)]
    assert sorted(listed) == [(r, c) for r in range(grid.height) for c in range(grid.width)]
    assert grid.coarse(4) == cells.coarse()


@given(grids)
def test_children(grid):
    cells = grid.coarse()
    width = 2 * cells.width
    expected = [
        [2 * i * width + 2 * j, 2 * i * width + 2 * j + 1, (2 * i + 1) * width + 2 * j, (2 * i + 1) * width + 2 * j + 1]
        for i in range(cells.height)
        for j in range(cells.width)
    ]
    assert grid.children().tolist() == expected


@given(grids, st.sampled_from([2, 4, 8]), st.sampled_from(["replicate", "circular"]))
def test_pad(grid, multiple, mode):
    tokens = random_tokens(1, grid.tokens, 4)
    height, width = (-(-side // multiple) * multiple for side in grid.shape)
    padded = grid.pad(tokens, multiple, mode).view(height, width, 4)
    source = tokens.view(*grid.shape, 4)
    for r in range(height):
        for c in range(width):
            if mode == "replicate":
                expected = source[min(r, grid.height - 1), min(c, grid.width - 1)]
            else:
                expected = source[r % grid.height, c % grid.width]
            assert torch.equal(padded[r, c], expected)


@given(layouts())
def test_every_token_of_the_grid_is_counted_once(layout):
    assert layout.area.sum() == layout.grid.tokens
    assert layout.tokens == len(layout.area) == len(layout.positions)
    cells = layout.grid.coarse()
    fine = {
        r * layout.grid.width + c
        for cell in layout.expanded_cells.tolist()
        for r, c in members(layout.grid, cell // cells.width, cell % cells.width)
    }
    assert layout.fine_tokens.tolist() == sorted(fine)
    assert layout.is_mixed + layout.is_coarse + layout.is_fine >= 1
    assert layout.is_mixed == (0 < int(layout.expanded.sum()) < layout.expanded.numel())


@given(layouts())
def test_fine_slots_name_the_child(layout):
    children = layout.grid.children()[layout.expanded_cells].flatten()
    width = 2 * layout.grid.coarse().width
    flat = (children // width) * layout.grid.width + children % width
    assert flat[layout.fine_slots].tolist() == layout.fine_tokens.tolist()


@given(layouts())
def test_positions_are_the_middle_of_what_a_token_covers(layout):
    grid, cells = layout.grid, layout.grid.coarse()
    places = [(cell // cells.width, cell % cells.width) for cell in layout.locked_cells.tolist()]
    if layout.is_coarse:
        expected = torch.tensor(places, dtype=torch.float32)
    else:
        middles = [torch.tensor(members(grid, i, j), dtype=torch.float32).mean(0) for i, j in places]
        fine = [torch.tensor([token // grid.width, token % grid.width]) for token in layout.fine_tokens.tolist()]
        expected = torch.stack([*middles, *fine]).float()
    assert layout.positions.dtype == torch.float32
    torch.testing.assert_close(layout.positions, expected, rtol=0, atol=0)


@pytest.mark.slow
@given(layouts())
def test_full_grid_shows_large_pixels_for_coarse_tokens(layout):
    grid, cells = layout.grid, layout.grid.coarse()
    tokens = random_tokens(2, layout.tokens, 8)
    split = len(layout.locked_cells)
    coarse = torch.zeros(2, cells.tokens, 8)
    coarse[:, layout.locked_cells] = tokens[:, :split]
    expected = F.interpolate(picture_of(coarse, cells), scale_factor=2, mode="nearest")
    height, width = (grid.geometry.patch * side for side in grid.shape)
    expected = expected[..., :height, :width]
    fine = torch.zeros(2, grid.tokens, 8)
    fine[:, layout.fine_tokens] = tokens[:, split:]
    is_fine = torch.zeros(2, grid.tokens, 8)
    is_fine[:, layout.fine_tokens] = 1
    expected = torch.where(picture_of(is_fine, grid) == 1, picture_of(fine, grid), expected)
    assert torch.equal(picture_of(layout.full_grid(tokens), grid), expected)


@given(layouts(st.builds(TokenGrid, st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]), geometries)))
def test_from_full_grid_is_the_inverse(layout):
    tokens = random_tokens(2, layout.tokens, 8)
    torch.testing.assert_close(layout.from_full_grid(layout.full_grid(tokens)), tokens)


@given(layouts())
def test_from_full_grid_keeps_the_picture(layout):
    # On an odd side a cell has pixels outside the picture, which the full grid cannot hold; the rest comes back.
    shown = layout.full_grid(random_tokens(2, layout.tokens, 8))
    torch.testing.assert_close(layout.full_grid(layout.from_full_grid(shown)), shown)


@given(grids)
def test_mean_pixels_halves_the_picture(grid):
    tokens = random_tokens(2, grid.tokens, 8)
    cells = grid.coarse()
    image, patch = picture_of(tokens, grid), grid.geometry.patch

    def padded(side):  # an odd side goes on with a copy of its last token
        pixels = list(range(patch * side))
        return pixels + pixels[-patch:] * (side % 2)

    expected = F.avg_pool2d(image[:, :, padded(grid.height)][:, :, :, padded(grid.width)], 2)
    torch.testing.assert_close(picture_of(mean_pixels(tokens, grid), cells), expected)


def test_repeat_pixels_fills_each_child_with_one_pixel():
    children = repeat_pixels(torch.arange(8.0).view(1, 1, 8))
    assert children[0, 0].tolist() == [[p] * 4 + [4 + p] * 4 for p in range(4)]


def test_repeat_pixels_of_unpacked_tokens_repeats_the_token():
    children = repeat_pixels(torch.arange(8.0).view(1, 1, 8), UNPACKED)
    assert children[0, 0].tolist() == [list(range(8))] * 4


@given(layouts())
def test_every_grid_made_of_another_holds_the_same_tokens(layout):
    grid = layout.grid
    for other in (grid.coarse(), grid.coarse(4), grid.extended(1, 2), layout.picture):
        assert other.geometry == grid.geometry
    assert grid.extended(1, 2).shape == (grid.height + 1, grid.width + 2)


def test_a_grid_needs_a_geometry():
    with pytest.raises(TypeError, match="geometry: expected TokenGeometry, got int"):
        TokenGrid(4, 6, 2)


def test_cells_touched_on_an_odd_side():
    # 9 tokens of 16 px: cells end at 32, 64, 96, 128 and 144 px.
    for pixel, cell in ((0, 0), (31, 0), (32, 1), (63, 1), (127, 3), (128, 4), (143, 4)):
        mask = torch.zeros(1, 144, 144)
        mask[0, pixel, 0] = 1
        assert cells_touched(mask, TokenGrid(9, 9))[0].nonzero().tolist() == [[cell, 0]]


@pytest.mark.parametrize("side", [(0, 1), (1, 0), (-1, 2)])
def test_a_grid_needs_tokens(side):
    with pytest.raises(ValueError, match="expected at least 1 x 1, got"):
        TokenGrid(*side)


@pytest.mark.parametrize("mask", [torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 3)], ids=["shape", "dtype"])
def test_a_layout_needs_a_mask_of_its_cells(mask):
    with pytest.raises(ValueError, match=r"expected bool \(2, 3\).*got"):
        MixedLayout(TokenGrid(4, 5), mask)


def test_the_tokens_of_several_grids_follow_each_other():
    grids = GridSet((TokenGrid(4, 6), TokenGrid(1, 1), TokenGrid(5, 3)))
    assert grids.tokens == 24 + 1 + 15
    tokens = torch.randn(2, grids.tokens, 8)
    parts = grids.split(tokens)
    assert [part.shape[1] for part in parts] == [24, 1, 15] and torch.equal(torch.cat(parts, 1), tokens)

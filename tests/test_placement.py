"""Where a reference lies on the output's grid, as pure data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specedit.grid import LayoutSet, MixedLayout, TokenGrid
from specedit.models.base import EditState
from specedit.placement import Placement, layouts_beside, picture_cells

sides = st.integers(1, 9)
placements = st.builds(
    lambda output, reference, row, col: Placement(TokenGrid(*output), TokenGrid(*reference), row, col),
    st.tuples(sides, sides), st.tuples(sides, sides), st.integers(-6, 6), st.integers(-6, 6),
)  # fmt: skip


def there(placement):
    """(row, column) of the reference at each (row, column) of the output that it covers."""
    return {
        (r + int(placement.row), c + int(placement.col)): (r, c)
        for r in range(placement.reference.height)
        for c in range(placement.reference.width)
        if 0 <= r + placement.row < placement.output.height and 0 <= c + placement.col < placement.output.width
    }


@given(placements)
def test_every_token_lies_where_its_position_is(placement):
    tokens = torch.arange(1.0, 1 + 4 * placement.reference.tokens).view(1, -1, 4)
    placed, here = placement.place(tokens), there(placement)
    assert placed.shape == (1, placement.output.tokens, 4)
    image, own = (x.view(*grid.shape, 4) for x, grid in ((placed, placement.output), (tokens, placement.reference)))
    covered = torch.zeros(placement.output.shape, dtype=torch.bool)
    for (r, c), (i, j) in here.items():
        assert torch.equal(image[r, c], own[i, j])
        covered[r, c] = True
    assert torch.equal(placement.covered, covered) and placement.covers == bool(covered.all())
    mask = torch.rand(2, *placement.reference.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = torch.zeros(2, *placement.output.shape, dtype=torch.bool)
    for (r, c), (i, j) in here.items():
        expected[:, r, c] = mask[:, i, j]
    assert torch.equal(placement.place_mask(mask), expected)


@given(placements)
def test_pixels_lie_where_their_tokens_do(placement):
    side = 3
    tokens = torch.randn(1, placement.reference.tokens, side * side, generator=torch.Generator().manual_seed(0))

    def pixels(tokens, grid):
        return tokens.view(1, *grid.shape, side, side).transpose(2, 3).reshape(1, 1, side * grid.height, -1)

    got = placement.place_pixels(pixels(tokens, placement.reference), side)
    covered = placement.covered.repeat_interleave(side, 0).repeat_interleave(side, 1)
    expected = pixels(placement.place(tokens), placement.output)
    assert got.shape == expected.shape and torch.equal(got[0, 0][covered], expected[0, 0][covered])


def test_beyond_the_reference_its_border_repeats():
    placement = Placement(TokenGrid(1, 5), TokenGrid(1, 2), 0, 2)
    assert placement.place(torch.tensor([[[1.0], [2.0]]])).flatten().tolist() == [1, 1, 1, 2, 2]
    pixels = placement.place_pixels(torch.tensor([[[[1.0, 2, 3, 4]] * 2]]).view(1, 1, 2, 4), 2)
    assert pixels[0, 0].tolist() == [[1] * 5 + [2, 3] + [4] * 3] * 2


@given(placements, st.integers(0, 2**31))
def test_a_cell_of_the_reference_is_split_where_a_token_of_it_lies_in_a_split_cell(placement, seed):
    draw = torch.Generator().manual_seed(seed)
    target = MixedLayout(placement.output, torch.rand(placement.output.coarse().shape, generator=draw) < 0.3)
    layout = placement.layout(target)
    if target.is_fine or target.is_coarse:
        assert layout.is_fine == target.is_fine and layout.is_coarse == target.is_coarse
        return
    expected = torch.zeros(placement.reference.coarse().shape, dtype=torch.bool)
    for (r, c), (i, j) in there(placement).items():
        expected[i // 2, j // 2] |= target.expanded[r // 2, c // 2]
    assert layout.grid == placement.reference and torch.equal(layout.expanded, expected)


@given(placements, st.integers(0, 2**31), st.sampled_from(["coarse", "mixed", "fine"]))
def test_positions_of_the_reference_are_those_of_the_output_under_it(placement, seed, kind):
    target = MixedLayout.all_fine(placement.output) if kind == "fine" else MixedLayout.all_coarse(placement.output)
    if kind == "mixed":
        expanded = torch.rand(placement.output.coarse().shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        target = MixedLayout(placement.output, expanded)
    layout = placement.layout(target)
    assert layout.unit == target.unit == (2 if target.is_coarse else 1)
    shift = torch.tensor([placement.row, placement.col])
    alone = MixedLayout(layout.grid, layout.expanded, counted=target.unit)
    assert torch.equal(layout.positions, alone.positions + shift / target.unit)


def test_a_reference_that_stays_coarse_counts_in_the_units_of_a_mixed_target():
    expanded = torch.zeros(4, 4, dtype=torch.bool)
    expanded[3, 3] = True
    target = MixedLayout(TokenGrid(8, 8), expanded)
    layout = Placement(TokenGrid(8, 8), TokenGrid(4, 4)).layout(target)  # which does not reach that cell
    assert layout.is_coarse and layout.positions.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_the_same_grid_keeps_its_layout():
    target = MixedLayout.all_fine(TokenGrid(3, 5))
    same = Placement(TokenGrid(3, 5), TokenGrid(3, 5))
    assert same.is_same and same.layout(target) is target and layouts_beside(target, (same,)) is target
    assert not Placement(TokenGrid(3, 5), TokenGrid(3, 5), 0, 1).is_same


def test_several_references_each_at_its_own_place():
    output = TokenGrid(4, 6)
    places = (Placement(output, output), Placement(output, TokenGrid(1, 1)), Placement(output, TokenGrid(5, 3), -1, 2))
    expanded = torch.zeros(2, 3, dtype=torch.bool)
    expanded[0, 1] = True
    layout = MixedLayout(output, expanded)
    several = layouts_beside(layout, places)
    assert isinstance(several, LayoutSet) and several.parts[0] is layout
    assert [part.expanded.int().tolist() for part in several.parts[1:]] == [[[0]], [[1, 0], [1, 0], [0, 0]]]
    assert several.tokens == sum(part.tokens for part in several.parts)
    assert several.is_mixed and not several.is_fine
    for whole in (MixedLayout.all_fine, MixedLayout.all_coarse):
        same = layouts_beside(whole(output), places)
        assert not same.is_mixed and same.is_fine == (whole == MixedLayout.all_fine)


def test_a_smaller_image_has_a_fraction_of_the_offset():
    small = Placement(TokenGrid(9, 8), TokenGrid(6, 8), 1, 0).at_scale(4)
    assert small == Placement(TokenGrid(3, 2), TokenGrid(2, 2), 0.25, 0.0)
    layout = small.layout(MixedLayout.all_fine(small.output))
    assert layout.positions.tolist() == [[0.25, 0], [0.25, 1], [1.25, 0], [1.25, 1]]


def test_a_mask_of_the_picture_goes_where_the_picture_lies():
    # 20 rows of the picture on 10 tokens, of which the output shows tokens 2 to 9, at its rows 0 to 7.
    placement = Placement(TokenGrid(9, 1), TokenGrid(10, 1), -2, 0)
    for row, cells in ((0, []), (3, []), (4, [0]), (7, [0]), (8, [1]), (19, [3])):
        mask = torch.zeros(1, 20, 1)
        mask[0, row] = 1
        assert picture_cells(mask, placement)[0, :, 0].nonzero().flatten().tolist() == cells


def make_state(grid, reference, **more):
    return EditState(
        grid=grid, noise=torch.zeros(1, grid.tokens, 4), reference=torch.ones(1, reference.tokens, 4),
        reference_grid=reference, generator=None, text_tokens=1, branches=1, pixels_per_token=16, **more,
    )  # fmt: skip


def test_cells_that_the_picture_covers_in_part_are_uncovered():
    grid, reference = TokenGrid(6, 6), TokenGrid(5, 9)
    state = make_state(grid, reference, placements=(Placement(grid, reference, 0, 1),))
    assert state.uncovered_cells.int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert make_state(grid, grid).uncovered_cells is None
    larger = Placement(grid, TokenGrid(8, 8), -1, -1)
    assert make_state(grid, TokenGrid(8, 8), placements=(larger,)).uncovered_cells is None


def test_a_state_whose_grids_differ_is_told_where_the_reference_lies():
    with pytest.raises(ValueError, match=r"placements: expected where each reference lies, .* got none"):
        make_state(TokenGrid(4, 4), TokenGrid(4, 5))

"""Where a reference lies on the output's grid, as pure data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specedit.layout import LayoutSet, MixedLayout, TokenGrid
from specedit.method.adapter import EditState
from specedit.method.draft import shrink
from specedit.method.groups import reference_on_layout
from specedit.placement import Placement, layouts_beside, picture_cells

sides = st.integers(1, 9)
placements = st.builds(
    lambda output, reference, row, col: Placement(TokenGrid(*output), TokenGrid(*reference), row, col),
    st.tuples(sides, sides), st.tuples(sides, sides), st.integers(-6, 6), st.integers(-6, 6),
)  # fmt: skip


def there(placement):
    """(row, column) of the reference at each (row, column) of the output that it covers."""
    return {
        (r + placement.row, c + placement.col): (r, c)
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


def target_of(kind, grid, seed):
    if kind != "mixed":
        return MixedLayout.all_fine(grid) if kind == "fine" else MixedLayout.all_coarse(grid)
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(seed)) < 0.4)


kinds = st.sampled_from(["coarse", "mixed", "fine"])


@given(placements, st.integers(0, 2**31), kinds)
def test_every_token_of_the_reference_is_as_fine_as_the_output_at_its_place(placement, seed, kind):
    target = target_of(kind, placement.output, seed)
    layout, here = placement.layout(target), {own: at for at, own in there(placement).items()}
    assert layout.picture == placement.reference and layout.unit == target.unit
    fine = torch.zeros(layout.grid.shape, dtype=torch.bool)
    fine.view(-1)[layout.fine_tokens] = True
    fine = fine[layout.lead[0] :, layout.lead[1] :]
    for r in range(placement.reference.height):
        for c in range(placement.reference.width):
            i, j = here.get((r, c), (None, None))
            inside = i is not None and bool(target.expanded[i // 2, j // 2])
            # What lies beyond the output shares a cell with what does not, or is coarse unless all is fine.
            i, j = (r + placement.row) // 2, (c + placement.col) // 2
            shared = 0 <= i < target.expanded.shape[0] and 0 <= j < target.expanded.shape[1]
            expected = target.is_fine or inside or (shared and bool(target.expanded[i, j]))
            assert bool(fine[r, c]) == expected


@given(placements, st.integers(0, 2**31), kinds)
def test_positions_of_the_reference_are_those_of_the_output_under_it(placement, seed, kind):
    target = target_of(kind, placement.output, seed)
    layout = placement.layout(target)
    row, col = placement.row, placement.col
    expected, areas = [], []
    cells = {}
    for r in range(placement.reference.height):
        for c in range(placement.reference.width):
            cells.setdefault(((r + row) // 2, (c + col) // 2), []).append((r + row, c + col))
    by_cell = zip(sorted(cells), layout.expanded.flatten().tolist(), strict=True)
    fine = []
    for cell, split in by_cell:
        if split:
            fine += cells[cell]
        else:
            middle = tuple(sum(x) / len(x) for x in zip(*cells[cell], strict=True))
            expected.append(cell if target.unit == 2 else middle)
            areas.append(len(cells[cell]))
    assert layout.positions.tolist() == [list(at) for at in expected + sorted(fine)]
    assert layout.area.tolist() == areas + [1] * len(fine) and layout.tokens == len(layout.area)


@given(placements, st.integers(0, 2**31), kinds)
def test_a_restricted_reference_is_averaged_over_the_outputs_cells(placement, seed, kind):
    layout = placement.layout(target_of(kind, placement.output, seed))
    # Tokens whose four pixels hold the position that each has on the output.
    at = layout.picture.positions() + torch.tensor([placement.row, placement.col])
    got = reference_on_layout(at[None].repeat_interleave(4, 2), layout)
    assert got.shape == (1, layout.tokens, 8)
    assert torch.equal(got[0, len(layout.locked_cells) :, ::4], at_fine(layout))
    whole = layout.area[: len(layout.locked_cells)] == 4
    middles = got[0, : len(layout.locked_cells)].view(-1, 2, 4).mean(-1)
    expected = layout.positions[: len(layout.locked_cells)] * layout.unit + (layout.unit - 1) / 2
    assert torch.equal(middles[whole], expected[whole])


def at_fine(layout):
    return layout.positions[len(layout.locked_cells) :] * layout.unit


@given(placements, st.sampled_from([2, 4]))
def test_a_draft_keeps_the_place(placement, scale):
    small = placement.cells(scale)
    top, left = placement.lead(scale)
    assert (scale * small.row + top, scale * small.col + left) == (placement.row, placement.col)
    assert small.output == placement.output.coarse(scale)
    tokens = torch.randn(1, placement.reference.tokens, 4)
    padded, grid = placement.with_lead(tokens, scale)
    shrunk, grid = shrink(padded, grid, scale)
    assert grid == small.reference and shrunk.shape == (1, grid.tokens, 4)
    assert small.layout(MixedLayout.all_fine(small.output)).tokens == grid.tokens


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
    assert isinstance(several, LayoutSet) and several.layouts[0] is layout
    assert [part.expanded.int().tolist() for part in several.layouts[1:]] == [[[0]], [[0, 0], [1, 0], [0, 0]]]
    assert several.tokens == sum(part.tokens for part in several.layouts)
    assert several.is_mixed and not several.is_fine
    for whole in (MixedLayout.all_fine, MixedLayout.all_coarse):
        same = layouts_beside(whole(output), places)
        assert not same.is_mixed and same.is_fine == (whole == MixedLayout.all_fine)


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


def test_a_state_with_different_grids_needs_placements():
    with pytest.raises(ValueError, match=r"placements: expected where each reference lies, .* got none"):
        make_state(TokenGrid(4, 4), TokenGrid(4, 5))

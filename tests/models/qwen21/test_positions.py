"""Where target tokens of any size lie beside references at full resolution."""

import pytest
import torch

from specedit.geometry import UNPACKED
from specedit.layout import MixedLayout, TokenGrid
from specedit.models import qwen21
from specedit.part_layout import PartLayout

if qwen21.QwenImage21 is None:
    pytest.skip("this diffusers has no Qwen-Image-2.1", allow_module_level=True)

from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope

from specedit.models.qwen21.positions import frequencies, scale_of, spans
from specedit.models.qwen21.prefix import frame_of

GRID = TokenGrid(10, 6, UNPACKED)
FINE = GRID.positions().view(10, 6, 2)


def covered(scale):
    """For every cell of so many tokens a side: the mean position and the number of the tokens in it."""
    rows = [FINE[i : i + scale, j : j + scale] for i in range(0, 10, scale) for j in range(0, 6, scale)]
    return torch.stack([r.mean((0, 1)) for r in rows]), torch.tensor([r.shape[0] * r.shape[1] for r in rows]).float()


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_token_lies_in_the_middle_of_what_it_covers(scale):
    for layout in (MixedLayout.all_fine(GRID.coarse(scale)), MixedLayout.all_coarse(GRID.coarse(scale))):
        centres, counts = covered(scale if layout.is_fine else 2 * scale)
        positions, area = spans(layout, GRID)
        torch.testing.assert_close(positions, centres)
        torch.testing.assert_close(area, counts)


def test_tokens_of_mixed_layouts():
    layout = MixedLayout(GRID, torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.5)
    small = MixedLayout(GRID, layout.expanded, counted=2)  # the same cells, counted as a small picture's
    (positions, area), (again, same) = spans(layout, GRID), spans(small, GRID)
    assert torch.equal(positions, layout.positions) and torch.equal(area, layout.area)
    torch.testing.assert_close(again, positions)
    assert torch.equal(same, area)
    part = PartLayout.fine(layout)
    assert torch.equal(spans(part, GRID)[0], part.positions)


def test_an_odd_side_ends_in_half_a_cell():
    positions, area = spans(MixedLayout.all_coarse(TokenGrid(5, 3, UNPACKED)), TokenGrid(5, 3, UNPACKED))
    assert positions[-1].tolist() == [4, 2] and area.tolist() == [4, 2, 4, 2, 2, 1]


def test_a_grid_that_fits_nowhere():
    with pytest.raises(ValueError, match=r"layout: expected the grid \(10, 6\) or its cells, got \(7, 6\)"):
        scale_of(TokenGrid(7, 6, UNPACKED), GRID)


@pytest.mark.parametrize("sides", [(10, 6), (7, 5)])
def test_whole_positions_have_the_bits_of_the_models_tables(sides):
    grid, rope = TokenGrid(*sides, UNPACKED), QwenImage21Rope(10000, [16, 56, 56])
    references = (TokenGrid(4, 8, UNPACKED), TokenGrid(6, 6, UNPACKED))
    text, image = [False] * 3, lambda grid: [True] * grid.tokens
    mask = text + image(references[0]) + text + image(references[1]) + text + image(grid)
    stock = rope([(1, *g.shape) for g in (*references, grid)], torch.tensor(mask), torch.device("cpu"))
    ours = frequencies(rope, frame_of(9, references), grid.positions(), grid)
    assert torch.equal(ours, stock[-grid.tokens :])

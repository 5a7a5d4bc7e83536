"""Rotary positions against the model's own tables."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from specedit.layout import LayoutSet, MixedLayout, TokenGrid
from specedit.models.qwen import positions
from specedit.models.shared import position_hook
from specedit.placement import Placement

SIZES = [[(8, 8)], [(5, 7), (8, 8)], [(6, 9), (4, 4), (11, 3)], [(1, 1), (1, 2)]]


def make_rope(scale_rope=True):
    return QwenEmbedRope(theta=10000, axes_dim=[8, 4, 4], scale_rope=scale_rope)


def table(rope, sizes, text):
    """The stock frequencies, whatever the version calls the length of the text."""
    shapes = [[(1, *size) for size in sizes]]
    try:
        return rope(shapes, max_txt_seq_len=text, device=torch.device("cpu"))
    except TypeError:  # diffusers 0.36
        return rope(shapes, [text], device=torch.device("cpu"))


@pytest.mark.parametrize("scale_rope", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_whole_positions_are_the_tables_to_the_bit(sizes, scale_rope):
    rope = make_rope(scale_rope)
    image, text = table(rope, sizes, 6)
    grids = [TokenGrid(*size) for size in sizes]
    first = MixedLayout.all_fine(grids[0])
    places = [Placement(grids[0], grid, *positions.reference_offset(grids[0], grid, scale_rope)) for grid in grids[1:]]
    others = [place.layout(first) for place in places]
    beside = LayoutSet(tuple(others)) if others else first
    target, reference = positions.all_positions(first, beside, scale_rope)
    at = torch.cat([target, reference] if others else [target])
    assert torch.equal(positions.phases(positions.angles(rope, at)), image)
    offset = positions.text_offset(first, LayoutSet(tuple(others)), scale_rope)
    text_at = (offset + torch.arange(6)).float()[:, None].expand(-1, 3)
    assert torch.equal(positions.phases(positions.angles(rope, text_at)), text)


def test_a_coarse_layout_is_a_small_image():
    rope = make_rope()
    layout = MixedLayout.all_coarse(TokenGrid(7, 10))
    at = positions.image_positions(layout, 0, True)
    image, text = table(rope, [(4, 5)], 6)
    assert torch.equal(positions.phases(positions.angles(rope, at)), image)
    text_at = (positions.text_offset(layout, layout, True) + torch.arange(6)).float()[:, None].expand(-1, 3)
    assert torch.equal(positions.phases(positions.angles(rope, text_at)), text)


@pytest.mark.parametrize("scale_rope", [True, False])
def test_text_positions_start_beyond_the_largest_picture(scale_rope):
    coarse, fine = MixedLayout.all_coarse(TokenGrid(7, 10)), MixedLayout.all_fine(TokenGrid(6, 4))
    mixed = MixedLayout(TokenGrid(6, 4), torch.tensor([[True, False]] * 3))
    for layout, side in ((coarse, 5), (fine, 6), (mixed, 6)):
        whole = side // 2 if scale_rope else side
        assert positions.text_offset(layout, layout, scale_rope) == whole
        assert positions.text_offset(layout, LayoutSet((layout,)), scale_rope) == whole
    larger = LayoutSet((coarse, MixedLayout.all_fine(TokenGrid(3, 12))))
    assert positions.text_offset(coarse, larger, scale_rope) == (6 if scale_rope else 12)


def test_a_locked_cell_is_positioned_at_the_centre_of_its_tokens():
    grid = TokenGrid(6, 4)
    expanded = torch.zeros(3, 2, dtype=torch.bool)
    expanded[0, 0] = True
    at = positions.image_positions(MixedLayout(grid, expanded), 2, True)
    # Row i of 6 is i - 3, column j of 4 is j - 2; the cell beside the expanded one covers rows 0, 1 and columns 2, 3.
    assert at[0].tolist() == [2, -2.5, 0.5]
    assert at[-4:].tolist() == [[2, -3, -2], [2, -3, -1], [2, -2, -2], [2, -2, -1]]


def test_the_hook_passes_other_calls_on_and_leaves_no_trace():
    rope = make_rope()
    plain = set(vars(rope))
    tables = rope.pos_freqs.clone()
    expected = table(rope, [(5, 7)], 3)
    for _ in range(2):
        position_hook.attach(rope, positions.FrequenciesHook)
    assert all(torch.equal(a, b) for a, b in zip(table(rope, [(5, 7)], 3), expected, strict=True))
    mine = torch.randn(2, 8), torch.randn(3, 8)
    placed = positions.ImgShapesWithFreqs(2, 5, 1, mine)
    assert placed == [[(1, 2, 1), (1, 5, 1)]]  # what zero_cond_t counts
    assert rope(placed, device=torch.device("cpu")) is mine
    position_hook.detach(rope)
    position_hook.detach(rope)
    assert set(vars(rope)) == plain and torch.equal(rope.pos_freqs, tables)


def test_the_hook_gives_back_another_librarys_replacement():
    rope = make_rope()
    theirs = lambda *args, **kwargs: "theirs"  # noqa: E731
    rope.forward = theirs
    position_hook.attach(rope, positions.FrequenciesHook)
    assert rope([[(1, 2, 2)]]) == "theirs"
    position_hook.detach(rope)
    assert vars(rope)["forward"] is theirs

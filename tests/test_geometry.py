"""What a token holds, against PyTorch's own pixel shuffle and against latent images cut up by hand."""

import pytest
import torch
import torch.nn.functional as F

from specedit.geometry import PACKED, UNPACKED, TokenGeometry
from specedit.layout import TokenGrid, cell_blocks
from specedit.placement import Placement

both = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])


def image_of(grid, channels=3):
    patch = grid.geometry.patch
    shape = 2, channels, patch * grid.height, patch * grid.width
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@both
def test_tokens_are_the_image_unshuffled(geometry):
    """As diffusers packs: row by row, channel slowest, then the rows and columns of the patch."""
    grid = TokenGrid(4, 6, geometry)
    image = image_of(grid)
    tokens = geometry.from_image(image)
    assert torch.equal(tokens, F.pixel_unshuffle(image, geometry.patch).flatten(2).transpose(1, 2))
    assert torch.equal(geometry.to_image(tokens, grid.shape), image)


@both
def test_blocks_are_the_squares_of_the_image(geometry):
    """Block p of a cell is the 2 x 2 square of latent pixels at which pixel p of the coarse image lies."""
    grid = TokenGrid(4, 6, geometry)
    image = image_of(grid)
    blocks = cell_blocks(geometry.from_image(image), grid)
    squares = torch.stack([image[..., a::2, b::2] for a in (0, 1) for b in (0, 1)], -1)
    for k in range(4):
        coarse_tokens = geometry.from_pixels(blocks[..., k])
        assert torch.equal(geometry.to_image(coarse_tokens, grid.coarse().shape), squares[..., k])


@both
def test_every_view_has_its_inverse(geometry):
    children = torch.randn(2, 5, 4, 8)
    blocks = geometry.to_blocks(children)
    assert blocks.shape == (2, 5, geometry.pixels, 8 // geometry.pixels, 4)
    assert torch.equal(geometry.from_blocks(blocks), children)
    pixels = geometry.to_pixels(children)
    assert pixels.shape == (2, 5, 4, geometry.pixels, 8 // geometry.pixels)
    assert torch.equal(geometry.from_pixels(pixels), children)


def test_a_patch_is_one_or_two_pixels_a_side():
    with pytest.raises(ValueError, match=r"patch: expected 1 \(unpacked\) or 2 \(packed 2 x 2\), got 4"):
        TokenGeometry(4)


def test_a_reference_has_the_outputs_geometry():
    with pytest.raises(ValueError, match="reference: expected tokens of the output's geometry, patch=1, got patch=2"):
        Placement(TokenGrid(4, 4, UNPACKED), TokenGrid(4, 4))


@both
def test_a_placed_reference_keeps_its_geometry(geometry):
    place = Placement(TokenGrid(8, 6, geometry), TokenGrid(5, 6, geometry), 3, 0)
    _, padded = place.with_lead(torch.zeros(1, 30, 4))
    for grid in (padded, place.cells().output, place.cells().reference, place.inverse.output):
        assert grid.geometry == geometry

import numpy as np
import pytest
import torch
from PIL import Image

from specedit.geometry import PACKED, UNPACKED
from specedit.layout import TokenGrid
from specedit.method.restore import blend_latents, feather, keep_pixels

CELLS = torch.zeros(2, 4, 5, dtype=torch.bool)
CELLS[0, 1:3, 1:4] = True
CELLS[1, 0:2, 0:2] = True


def covered(cells, scale, size):
    return cells.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, : size[0], : size[1]]


@pytest.mark.parametrize("size", [(64, 80), (56, 72)], ids=["whole cells", "cut cells"])
def test_feather_rises_inside_the_edited_cells(size):
    weight = feather(CELLS, 16, 4, size)
    inside = covered(CELLS, 16, size)
    assert weight.shape == (2, *size)
    assert (weight[~inside] == 0).all() and (weight[inside] > 0).any()
    assert (weight[0, 24:40, 24:56] == 1).all()  # eight or more samples from the edge
    across = weight[0, 32, 12:40]
    assert (across.diff() >= 0).all() and len(across.unique()) > 5  # a ramp, not a step
    assert weight.min() >= 0 and weight.max() <= 1


def test_the_border_of_the_picture_is_no_seam():
    weight = feather(CELLS, 16, 4, (64, 80))
    assert (weight[1, 0, :16] == 1).all() and (weight[1, :16, 0] == 1).all()
    everything = feather(torch.ones(1, 3, 3, dtype=torch.bool), 8, 2, (20, 24))
    assert (everything == 1).all()


@pytest.mark.parametrize("grid", [TokenGrid(8, 10), TokenGrid(7, 9)], ids=str)
def test_blend_latents_returns_the_reference_outside(grid):
    tokens, reference = torch.randn(2, 2, grid.tokens, 16, generator=torch.Generator().manual_seed(0))
    inside = covered(CELLS, 2, grid.shape).flatten(1)
    tokens[~inside] = float("nan")  # whatever the locked tokens became, nothing of it is left
    out = blend_latents(tokens, reference, CELLS, grid)
    assert torch.equal(out[~inside], reference[~inside])
    within = torch.zeros(2, *grid.shape, dtype=torch.bool)
    within[0, 3:5, 3:7] = within[1, :3, :3] = True  # a token from the edge
    assert torch.equal(out[within.flatten(1)], tokens[within.flatten(1)])
    seam = inside & ~within.flatten(1)
    assert not torch.equal(out[seam], tokens[seam]) and not torch.equal(out[seam], reference[seam])


@pytest.mark.parametrize("shape", [(8, 10), (7, 9)], ids=str)
def test_unpacked_tokens_have_no_seam_inside_a_token(shape):
    """Half a token is no whole latent pixel there: edited tokens are kept as they are, even of a cell on its own."""
    grid = TokenGrid(*shape, UNPACKED)
    cells = CELLS.clone()
    cells[1] = False
    cells[1, 2, 3] = True
    tokens, reference = torch.randn(2, 2, grid.tokens, 5, generator=torch.Generator().manual_seed(0))
    inside = covered(cells, 2, grid.shape).flatten(1)
    tokens[~inside] = float("nan")
    assert torch.equal(blend_latents(tokens, reference, cells, grid), torch.where(inside[..., None], tokens, reference))


@pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])
def test_blend_latents_of_everything_and_nothing(geometry):
    grid = TokenGrid(4, 6, geometry)
    tokens, reference = torch.randn(2, 1, grid.tokens, 16)
    everything = torch.ones(1, 2, 3, dtype=torch.bool)
    assert torch.equal(blend_latents(tokens, reference, everything, grid), tokens)
    assert torch.equal(blend_latents(tokens, reference, ~everything, grid), reference)


def pictures(seed):
    return np.random.default_rng(seed).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)


def as_output(pixels, kind):
    if kind == "pil":
        return [Image.fromarray(p) for p in pixels]
    values = pixels.astype(np.float32) / 255
    return values if kind == "np" else torch.from_numpy(values).permute(0, 3, 1, 2)


def as_array(images, kind):
    if kind == "pil":
        return np.stack([np.asarray(image) for image in images])
    return images if kind == "np" else images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_keep_pixels_is_exact_outside_the_edit(kind):
    edited, source = pictures(0), pictures(1)
    out = keep_pixels(as_output(edited, kind), as_output(source, "pt"), CELLS, 16, kind)
    assert type(out) is type(as_output(edited, kind))
    out, edited, source = (as_array(x, kind) for x in (out, as_output(edited, kind), as_output(source, kind)))
    assert out.dtype == edited.dtype
    outside = ~covered(CELLS, 16, (64, 80)).numpy()
    assert np.array_equal(out[outside], source[outside])
    assert np.array_equal(out[0, 24:40, 24:56], edited[0, 24:40, 24:56])


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_keep_pixels_of_an_edit_everywhere_changes_nothing(kind):
    images = as_output(pictures(0), kind)
    out = keep_pixels(images, as_output(pictures(1), "pt"), torch.ones_like(CELLS), 16, kind)
    assert np.array_equal(as_array(out, kind), as_array(images, kind))


def test_a_cell_on_its_own_reaches_full_weight_and_nothing_leaks_out():
    cells = torch.zeros(1, 5, 5, dtype=torch.bool)
    cells[0, 2, 2] = True
    for scale, radius in ((4, 1), (32, 8)):
        weight = feather(cells, scale, radius, (5 * scale, 5 * scale))[0]
        inside = cells[0].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert weight[inside].max() == 1 and weight[~inside].max() == 0

import torch

from specedit.method.canny import canny


def square(value=1.0, side=32):
    image = torch.zeros(1, 3, side, side)
    image[..., 8:24, 8:24] = value
    return image


def test_a_flat_picture_has_no_edges():
    assert not canny(torch.full((2, 3, 16, 16), 0.7)).any()


def test_edges_follow_the_outline():
    edges = canny(square())[0]
    rows, columns = edges.nonzero().unbind(1)
    assert len(rows) > 40  # most of the 64 px outline
    near = [((values - 7.5).abs() < 1.5) | ((values - 23.5).abs() < 1.5) for values in (rows, columns)]
    assert (near[0] | near[1]).all()
    assert rows.min() >= 7 and columns.min() >= 7 and rows.max() <= 24 and columns.max() <= 24
    # one pixel thin across a straight side
    assert (edges[12:20, 4:12].sum(1) == 1).all() and (edges[4:12, 12:20].sum(0) == 1).all()


def test_a_disc_is_closed_and_thin():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    radius = ((y - 31.5) ** 2 + (x - 31.5) ** 2).sqrt()
    edges = canny((radius < 20).float().expand(1, 3, 64, 64))[0]
    assert (radius[edges] - 20).abs().max() < 2
    angles = torch.atan2(y - 31.5, x - 31.5)[edges]
    assert len(torch.histc(angles, 24, -3.1416, 3.1416).nonzero()) == 24


def test_colour_counts_as_luma():
    blue, green = torch.zeros(2, 1, 3, 32, 32)
    blue[:, 2], green[:, 1] = square(0.5)[:, 2], square(0.5)[:, 1]
    # 0.5 * 0.114 * 255 * 4 (Sobel) is below 100; the same of green is above 200
    assert not canny(blue).any() and canny(green).any()


def test_weak_edges_survive_only_next_to_strong_ones():
    # The luma steps along row 8; by how much grows from column to column, past the strong threshold at 200 / 1020.
    step = torch.linspace(0.12, 0.5, 48)
    picture = torch.zeros(1, 3, 16, 48)
    picture[..., 8:, :] = step
    weak = torch.zeros(1, 3, 16, 48)
    weak[..., 8:, :] = step.clamp(max=0.18)
    assert canny(picture)[0, 7:9, 2:10].any(0).all()
    assert not canny(weak).any()


def test_samples_do_not_meet():
    images = torch.cat([square(), torch.zeros(1, 3, 32, 32), square(0.6)])
    together = canny(images)
    assert together.shape == (3, 32, 32) and together.dtype == torch.bool
    for i in range(3):
        assert torch.equal(together[i], canny(images[i : i + 1])[0])

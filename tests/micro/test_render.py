"""Shapes: where their distance functions say, with edges one pixel wide."""

import math

import pytest
import torch

from specedit.micro.render import DISTANCE, Backdrop, Thing, backdrop, coverage
from specedit.micro.vocabulary import SHAPES

# Areas of shapes of radius 1.
AREA = {
    "circle": math.pi, "square": 1.7**2, "triangle": 3 * math.sqrt(3) / 4, "diamond": 2.0,
    "hexagon": 3 * math.sqrt(3) / 2, "ring": math.pi * (1 - 0.25), "cross": 2 * 2 * 0.66 - 0.66**2,
    "star": 5 * 0.45 * math.sin(math.pi / 5),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_area(shape):
    alpha = coverage([Thing(shape, "red", 0.5, 0.5, 0.3)], 400, 400)[0]
    radius = 0.3 * 400
    assert alpha.sum().item() == pytest.approx(AREA[shape] * radius**2, rel=0.01)
    assert alpha.min() >= 0 and alpha.max() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_negative_inside_and_fits_the_unit_circle(shape):
    angle = torch.linspace(0, 2 * math.pi, 90)
    assert (DISTANCE[shape](1.21 * angle.cos(), 1.21 * angle.sin()) > 0).all()
    middle = DISTANCE[shape](torch.zeros(1), torch.zeros(1))
    assert middle > 0 if shape == "ring" else middle < 0


def test_edges_are_antialiased():
    alpha = coverage([Thing("circle", "red", 0.5, 0.5, 0.3)], 64, 64)[0]
    between = (alpha > 0) & (alpha < 1)
    assert 0.5 < between.sum().item() / (2 * math.pi * 0.3 * 64) < 2


def test_a_square_wave_covers_half():
    photos = torch.zeros(1, 3, 8, 8)
    for kind in ("stripes", "checks"):
        image = backdrop([Backdrop(kind, (0, 0, 0), (1, 1, 1), period=0.25)], 128, 128, photos)
        assert image.mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_photo_window_is_a_crop_and_can_be_mirrored():
    photo = torch.rand(1, 3, 64, 64)
    whole = backdrop([Backdrop("photo", photo=0)], 64, 64, photo)
    assert torch.allclose(whole, photo, atol=1e-5)
    mirrored = backdrop([Backdrop("photo", photo=0, window=(1.0, 0.0, -1.0, 1.0))], 64, 64, photo)
    assert torch.allclose(mirrored, photo.flip(-1), atol=1e-5)


def test_unknown_background():
    with pytest.raises(ValueError, match="unknown background kind 'sea'"):
        backdrop([Backdrop("sea")], 16, 16, torch.zeros(1, 3, 8, 8))

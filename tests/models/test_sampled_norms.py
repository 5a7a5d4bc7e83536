"""Group norms of a part of a picture, by the statistics of squares of the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specedit.models.shared.decode_boxes import Box
from specedit.models.shared.sampled_norms import Moments, one_in, recorded, run, squares


def picture(side=16, dtype=torch.float32):
    return (torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)


def norm(dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.GroupNorm(4, 8)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made.requires_grad_(False).to(dtype)


def test_moments_are_those_of_all_samples():
    x = picture().unflatten(2, (2, 8)).movedim(2, 1).flatten(0, 1)  # two halves of a picture as samples
    rows = picture().view(4, -1)
    for got, expected in zip(Moments.of(x, 4), (rows.mean(1), rows.var(1, correction=0)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_box_with_the_wholes_moments_is_a_part_of_the_whole(dtype, tolerance):
    x, layer, box = picture(dtype=dtype), norm(dtype), Box(2, 9, 4, 16)
    x[..., :4] *= 3
    moments = recorded([layer], x)
    part = run([layer], box.of(x), moments)
    assert part.dtype == dtype and moments[0].mean.dtype == torch.float32
    torch.testing.assert_close(part, box.of(layer(x)), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(part, layer(box.of(x)), rtol=0.1, atol=0.1)


def test_every_norm_has_its_own_moments():
    x, layers = picture(), [norm(), nn.SiLU(), norm()]
    box = Box(2, 9, 4, 16)
    part = run(layers, box.of(x), recorded(layers, x))
    torch.testing.assert_close(part, box.of(run(layers, x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [4, 7, 8])
def test_squares_are_a_share_of_the_picture_spread_over_it(every):
    numbers = torch.arange(15 * 17.0).view(1, 1, 15, 17)
    chosen = squares(F.pad(F.interpolate(numbers, scale_factor=4), (0, 3, 0, 2), value=-1), 4, every)
    values = chosen.flatten(1)
    assert chosen.shape[1:] == (1, 4, 4) and (values == values[:, :1]).all()
    found = values[:, 0].unique()
    assert len(found) == len(chosen) and found.min() >= 0 and abs(len(found) / (15 * 17) - 1 / every) < 0.02
    columns = torch.bincount((found % 17).long(), minlength=17)
    assert columns.min() >= 1 and columns.max() <= columns.float().mean().ceil() + 2
    assert len((found // 17).unique()) == 15


def test_larger_pictures_need_no_more_squares():
    assert [one_in(side, side, 8) for side in (32, 56, 63)] == [None] * 3
    assert [one_in(side, side, 8) for side in (64, 96, 128, 256)] == [4, 4, 8, 32]
    assert one_in(8, 512, 8) == 4 and one_in(7, 512, 8) is None

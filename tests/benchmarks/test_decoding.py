"""What stands in for the whole picture's statistics in `benchmarks.decoding`."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.decoding import Box, GroupNorms, Moments, patches, recorded, run


def picture(side=16):
    return torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(0)) * 3 + 1


def norm():
    made = nn.GroupNorm(4, 8)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made.requires_grad_(False)


def test_a_norm_with_its_own_moments_is_the_stock_one():
    x, layer = picture(), norm()
    with GroupNorms(lambda i, x, groups: Moments.of(x, groups)):
        own = layer(x)
    torch.testing.assert_close(own, layer(x), rtol=1e-4, atol=1e-5)


def test_a_box_with_the_wholes_moments_is_a_part_of_the_whole():
    x, layer, box = picture(), norm(), Box(2, 9, 4, 16)
    whole, _ = recorded([layer], x)
    part = run([layer], box.of(x, 1), lambda i, x, groups: whole[i])
    torch.testing.assert_close(part, box.of(layer(x), 1), rtol=1e-4, atol=1e-5)


def test_exchanging_a_part_gives_the_changed_wholes_moments():
    before, box = picture(), Box(2, 9, 4, 16)
    after = before.clone()
    box.of(after, 1).mul_(2).add_(1)
    old, new = (Moments.of(box.of(x, 1), 4) for x in (before, after))
    found = Moments.of(before, 4).exchange(old, new, box.area / 16**2)
    for one, expected in zip(found, Moments.of(after, 4), strict=True):
        torch.testing.assert_close(one, expected)


def test_patches_are_a_share_of_the_squares():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    squares = F.interpolate(x, scale_factor=4)
    for every in (4, 8):
        chosen = patches(squares, 4, every)
        assert chosen.shape == (64 // every, 1, 4, 4)
        values = chosen.flatten(1)
        assert (values == values[:, :1]).all() and len(values[:, 0].unique()) == 64 // every

"""What stands in for the whole picture's statistics in `benchmarks.decoding`."""

import torch

from benchmarks.decoding import calibrate, cut, exchange
from specedit.models.shared.decode_boxes import Box
from specedit.models.shared.sampled_norms import Moments


def picture(side=16):
    return torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_exchanging_a_part_gives_the_changed_wholes_moments():
    before, box = picture(), Box(2, 9, 4, 16)
    after = before.clone()
    box.of(after).mul_(2).add_(1)
    old, new = (Moments.of(box.of(x), 4) for x in (before, after))
    found = exchange(Moments.of(before, 4), old, new, box.area / 16**2)
    for one, expected in zip(found, Moments.of(after, 4), strict=True):
        torch.testing.assert_close(one, expected)


def test_calibration_takes_over_what_a_part_shows():
    small, whole = (Moments.of(picture()[..., :rows], 4) for rows in (6, 16))
    large = Moments(small.mean + 1, small.variance * 2)
    for one, expected in zip(calibrate(whole, small, large), (whole.mean + 1, whole.variance * 2), strict=True):
        torch.testing.assert_close(one, expected)


def test_a_box_is_cut_at_every_scale():
    x = picture()
    assert torch.equal(cut(x, Box(1, 3, 0, 4), 4), x[..., 4:12, 0:16])
    assert torch.equal(cut(x, Box(4, 12, 0, 16), 32), x[..., 2:6, 0:8])

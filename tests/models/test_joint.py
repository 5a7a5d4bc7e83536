"""Where rows of joint and packed sequences lie, and which of them ask."""

import torch

from specedit.models.joint import pack, segments


def test_pack_gives_every_row_its_place():
    packing = pack([2, 0, 3], target=2, reference=1, device="cpu")
    assert packing.cu_seqlens.tolist() == [0, 5, 8, 14] and packing.longest == 6
    assert packing.text.tolist() == [0, 1, 8, 9, 10]
    assert packing.image.tolist() == [2, 3, 5, 6, 11, 12, 4, 7, 13]  # targets of all, then references


def test_segments_of_several_sequences():
    coarse = torch.tensor([0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    parts = segments(coarse, [3, 2, 2])
    assert parts.order.tolist() == [0, 3, 4, 6, 1, 2, 5]
    assert parts.cu_q.tolist() == [0, 1, 3, 4, 6, 6, 7]  # fine of each, then coarse of each; the second has none
    assert parts.cu_k.tolist() == [0, 3, 5, 7, 10, 12, 14]


def test_segments_of_some_queries():
    parts = segments(torch.tensor([1, 0, 0], dtype=torch.bool), [2, 1], [7, 4])
    assert parts.cu_q.tolist() == [0, 1, 2, 3, 3] and parts.cu_k.tolist() == [0, 7, 11, 18, 22]

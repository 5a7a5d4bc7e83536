"""Where rows of joint and packed sequences lie, which are queries, and contexts that move whole."""

from dataclasses import fields

import torch

from specedit.models.attention.contexts import Mixed, Packed, PhaseAligned
from specedit.models.attention.kept_keys import Partial
from specedit.models.attention.sequences import QueryRows, pack, segments


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


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for one in value for tensor in tensors(one)]
    parts = fields(value) if hasattr(value, "__dataclass_fields__") else ()
    return [tensor for part in parts for tensor in tensors(getattr(value, part.name))]


def test_a_context_moves_whole_and_keeps_its_cache():
    coarse, tables, entries = torch.tensor([True, False, True]), (torch.ones(3, 2), torch.zeros(3, 2)), {}
    whole = Packed(
        rotary=tables, key_bias=torch.zeros(3), aligned=PhaseAligned(tables, segments(coarse)), backend="torch",
        output_rows=QueryRows(torch.arange(1), segments(coarse[:1])), packing=pack([1, 0], 1, 0, "cpu"),
    )  # fmt: skip
    context = Partial(
        whole=whole, entries=entries, rows=torch.arange(2)[None], rotary=tables, index=torch.arange(2),
        query_rows=QueryRows(torch.arange(2)), output_rows=None,
    )  # fmt: skip
    assert context.to("cpu") is context and context.to(torch.device("cpu"), non_blocking=True) is context
    moved = context.to("meta")
    assert len(tensors(moved)) == len(tensors(context)) == 25
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved.entries is entries and moved.whole.backend == "torch" and not context.rotary[0].is_meta
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(context)]


def test_a_context_without_an_option_moves_too():
    context = Mixed(rotary=(torch.ones(3, 2), torch.zeros(3, 2)), index=torch.arange(3))
    moved = context.to("meta")
    assert moved.index.is_meta and moved.key_bias is moved.aligned is moved.output_rows is None


def test_merged_attention_reads_the_bias_once_a_stage():
    tables, bias = (torch.ones(3, 2), torch.zeros(3, 2)), torch.tensor([0.0, 1.0, 0.0])
    assert Mixed(rotary=tables, index=torch.arange(3), key_bias=bias).groups is None
    context = Mixed(rotary=tables, index=torch.arange(3), key_bias=bias, backend="merged")
    assert [rows.tolist() for rows in context.groups.rows] == [[0, 2], [1]]
    moved = context.to("meta")  # nothing can be read there
    assert [rows.device.type for rows in moved.groups.rows] == ["meta"] * 2 and moved.groups.values == (0.0, 1.0)
    packed = Packed(rotary=tables, key_bias=bias[None], backend="merged", packing=pack([1, 0], 1, 0, "cpu"))
    assert [ends.tolist() for ends in packed.groups.ends] == [[0, 1, 2], [0, 1, 1]]

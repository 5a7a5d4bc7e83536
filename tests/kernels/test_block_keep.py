"""BlockKeep: how lists are made, which are refused, and how operators and launches take them."""

import importlib.util
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specedit_kernels as kernels
from specedit_kernels import BlockKeep, available_backends, block_keep

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
compiled_only = pytest.mark.skipif(INTERPRETING, reason="operators run compiled kernels")
runs_kernels = pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")


def ints(*values, **options):
    return torch.tensor(values, dtype=torch.int32, **options)


def rows_of(keep):
    """The lists as Python numbers, all of them in one line."""
    ends = keep.offsets.reshape(-1, keep.offsets.shape[-1]).tolist()
    return [keep.blocks[a:b].tolist() for line in ends for a, b in itertools.pairwise(line)]


SHAPES = st.lists(st.integers(1, 3), max_size=2).flatmap(
    lambda lead: st.tuples(*map(st.just, lead), st.integers(0, 4), st.integers(0, 5))
)


@given(shape=SHAPES, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_mask_becomes_its_lists(shape, share, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    keep = BlockKeep.from_mask(mask)
    assert keep.offsets.shape == (*shape[:-2], shape[-2] + 1) and keep.offsets.dtype == torch.int32
    assert keep.blocks.dtype == torch.int32 and keep.key_blocks == shape[-1]
    assert rows_of(keep) == [row.nonzero().flatten().tolist() for row in mask.flatten(0, -2)]


def test_masks_of_a_packed_batch_follow_each_other():
    masks = [torch.ones(2, 1, 3, dtype=torch.bool), torch.zeros(2, 0, 2, dtype=torch.bool), torch.eye(2).bool()[None]]
    masks[2] = masks[2].repeat(2, 1, 1)
    keep = BlockKeep.from_masks(masks)
    assert keep.offsets.shape == (2, 4) and rows_of(keep) == [[0, 1, 2], [0], [1]] * 2


def test_the_default_block_is_a_gpu_tile():
    keep = BlockKeep.from_mask(torch.ones(1, 1, dtype=torch.bool))
    assert (keep.query_block, keep.key_block) == (128, 128)
    with pytest.raises(AttributeError):
        keep.key_block = 64


TRUE = torch.ones(2, 2, dtype=torch.bool)
WRONG_LISTS = {
    "offsets of int64": (lambda: BlockKeep(ints(0, 1).long(), ints(0)), TypeError, "offsets: expected dtype int32"),
    "blocks of int64": (lambda: BlockKeep(ints(0, 1), ints(0).long()), TypeError, "blocks: expected dtype int32, got"),
    "a list": (lambda: BlockKeep([0, 1], ints(0)), TypeError, "offsets: expected a torch.Tensor, got list"),
    "blocks of two axes": (lambda: BlockKeep(ints(0, 1), ints(0)[None]), ValueError, "blocks: expected 1 dim.* got"),
    "offsets of four axes": (
        lambda: BlockKeep(ints(0, 1)[None, None, None], ints(0)), ValueError, "offsets: expected 1 or 2 or 3 dim.* got",
    ),
    "two devices": (
        lambda: BlockKeep(ints(0, 1), ints(0, device="meta")), ValueError, "blocks: expected device cpu, got meta",
    ),
    "no offsets": (lambda: BlockKeep(ints(), ints(0)), ValueError, "offsets: expected at least 1 entry"),
    "decreasing offsets": (
        lambda: BlockKeep(ints(0, 3, 2), ints(0, 1, 2)), ValueError, "offsets: .* never decrease, got 3 then 2",
    ),
    "offsets past the end": (
        lambda: BlockKeep(ints(0, 4), ints(0, 1, 2)), ValueError, r"offsets: .* in \[0, 3\], got .* 0 to 4",
    ),
    "negative offsets": (lambda: BlockKeep(ints(-1, 1), ints(0)), ValueError, r"offsets: .* got values from -1 to 1"),
    "unsorted": (
        lambda: BlockKeep(ints(0, 1, 4), ints(5, 0, 2, 1)), ValueError, r"increase within a row, got \[0, 2, 1\]",
    ),
    "repeated": (lambda: BlockKeep(ints(0, 2), ints(3, 3)), ValueError, r"increase within a row, got \[3, 3\]"),
    "negative block": (lambda: BlockKeep(ints(0, 2), ints(-1, 3)), ValueError, "blocks: .* at least 0, got -1"),
    "block size of 96": (
        lambda: BlockKeep.from_mask(TRUE, query_block=96), ValueError, "query_block: .* multiple of 64, got 96",
    ),
    "block size of 0": (lambda: BlockKeep.from_mask(TRUE, key_block=0), ValueError, "key_block: expected .* got 0"),
    "block size of True": (
        lambda: BlockKeep.from_mask(TRUE, key_block=True), TypeError, "key_block: expected an int, got bool",
    ),
    "block size of 64.0": (
        lambda: BlockKeep.from_mask(TRUE, key_block=64.0), TypeError, "key_block: expected an int, got float",
    ),
    "a mask of numbers": (lambda: BlockKeep.from_mask(TRUE.int()), TypeError, "mask: expected dtype bool, got int32"),
    "a mask of one axis": (lambda: BlockKeep.from_mask(TRUE[0]), ValueError, "mask: expected 2 or 3 or 4 dim.* got"),
    "a mask of too many blocks": (
        lambda: BlockKeep.from_mask(TRUE[:1, :1].expand(1 << 16, 1 << 15)), ValueError, r"fewer than 2\^31 blocks, got",
    ),
    "no masks": (lambda: BlockKeep.from_masks([]), ValueError, "masks: expected at least one, got none"),
    "masks of other heads": (
        lambda: BlockKeep.from_masks([TRUE.expand(2, 2, 2), TRUE.expand(3, 2, 2)]), ValueError,
        r"masks\[1\]: expected shape \(2, 2, 2\), got \(3, 2, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_lists(case):
    make, error, text = WRONG_LISTS[case]
    with pytest.raises(error, match=text):
        make()


Q, CU = torch.zeros(2, 150, 4, 16), ints(0, 100, 150)
PACKED = torch.zeros(150, 4, 16)


def keep(*shape, **more):
    return BlockKeep.from_mask(torch.ones(shape, dtype=torch.bool), **{"query_block": 64, "key_block": 64} | more)


def dense(given):
    return lambda: kernels.mixed_attention(Q, Q, Q, block_keep=given, backend="torch")


def packed(given):
    return lambda: kernels.mixed_attention(
        PACKED, PACKED, PACKED, cu_seqlens_q=CU, cu_seqlens_k=CU, block_keep=given, backend="torch"
    )


WRONG_CALLS = {
    "a mask": (dense(TRUE), TypeError, "block_keep: expected a BlockKeep, got Tensor"),
    "another device": (
        dense(BlockKeep.from_mask(TRUE.to("meta"))), ValueError, "block_keep: expected device cpu, got meta",
    ),
    "other query blocks": (dense(keep(2, 3)), ValueError, "expected 3 query blocks of 64 for 150 queries, got 2"),
    "other key blocks": (dense(keep(3, 2)), ValueError, "expected 3 key blocks of 64 for 150 keys, got 2"),
    "other sizes": (
        dense(keep(3, 3, query_block=128)), ValueError, "expected 2 query blocks of 128 for 150 queries, got 3",
    ),
    "other samples": (
        dense(keep(3, 1, 3, 3)), ValueError, r"offsets of shape \(R \+ 1,\) or \(2 or 1, 4 or 1, R .* got \(3, 1, 4\)",
    ),
    "heads of the keys": (dense(keep(1, 2, 3, 3)), ValueError, r"\(2 or 1, 4 or 1, R \+ 1\), got \(1, 2, 4\)"),
    "a list per head for dense queries": (dense(keep(4, 3, 3)), ValueError, r"expected offsets .* got \(4, 4\)"),
    "a list per sample for packed queries": (
        packed(keep(1, 4, 3, 2)), ValueError, r"expected offsets of shape .* \(4 or 1, R \+ 1\), got \(1, 4, 4\)",
    ),
    "a block that is not there": (
        dense(BlockKeep(ints(0, 1, 2, 3), ints(0, 1, 3), 64, 64)), ValueError, r"key blocks in \[0, 3\) of 64 .* got 3",
    ),
    "a block that this sequence lacks": (
        packed(BlockKeep(ints(0, 1, 2, 4), ints(1, 1, 0, 1), 64, 64)), ValueError, r"blocks in \[0, 1\) of 64 .* got 1",
    ),
    "query blocks of a packed batch": (
        packed(keep(4, 1)), ValueError, "expected 3 query blocks of 64 for these sequences, got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls(case):
    call, error, text = WRONG_CALLS[case]
    with pytest.raises(error, match=text) as caught:
        call()
    assert str(caught.value).startswith("block_keep: expected")


def test_values_on_a_gpu_are_read_in_debug_mode_only(monkeypatch):
    """A tensor that answers no question about its values stands for one on a GPU."""
    monkeypatch.setattr(block_keep.checks, "values_are_checked", lambda tensor: False)
    wrong = BlockKeep(ints(0, 3, 2), ints(5, 5, -1), 64, 64)
    args = (Q[:, :100], Q, Q, None, None, None, None, 0.25, False, wrong.offsets, wrong.blocks, 64, 64)
    block_keep.check_values(args, read=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="offsets: expected values that never decrease, got 3 then 2"):
        block_keep.check_values(args, read=False)


# --- operators --------------------------------------------------------------------------------------------------------


def arguments(device, listed, lse):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(150, 2, 16, generator=g).to(device)
    cu = CU.to(device)
    mask = torch.tensor([[True, False], [True, True], [True, False]], device=device)
    lists = BlockKeep.from_mask(mask, query_block=64, key_block=64)
    if listed == "dense":
        q, cu = q[None], None
        lists = BlockKeep.from_mask(torch.eye(3, device=device).bool().expand(1, 2, 3, 3), query_block=64, key_block=64)
    return (q, q, q, cu, cu, None, None, 0.25, lse, lists.offsets, lists.blocks, 64, 64)


@compiled_only
@pytest.mark.parametrize("listed", ["packed", "dense"])
@pytest.mark.parametrize("lse", [False, True])
def test_opcheck(device, listed, lse):
    args = arguments(device, listed, lse)
    operator = torch.ops.specedit_kernels.mixed_attention.default
    torch.library.opcheck(operator, args)
    meta = operator(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    assert [(x.shape, x.dtype, x.stride()) for x in operator(*args)] == [(x.shape, x.dtype, x.stride()) for x in meta]


@pytest.mark.slow
@compiled_only
def test_a_compiled_call_makes_its_own_lists(device):
    """Scores, mask, lists and attention in one graph, which other lengths do not compile again."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def edit(q, threshold):
        pooled = q.unflatten(1, (-1, 64)).mean(2).transpose(1, 2)  # (B, H, R, D)
        mask = pooled @ pooled.transpose(-1, -2) > threshold
        lists = BlockKeep.from_mask(mask, query_block=64, key_block=64)
        return kernels.mixed_attention(q, q, q, block_keep=lists, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(edit, fullgraph=True, dynamic=True, backend=counter)
    for blocks in (3, 5, 8):
        q = torch.randn(2, 64 * blocks, 4, 16, device=device)
        for got, want in zip(compiled(q, 0.0), edit(q, 0.0)):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.slow
@compiled_only
def test_lists_from_outside_a_compiled_call(device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, lists: kernels.mixed_attention(q, q, q, block_keep=lists), fullgraph=True, backend="eager"
    )
    q = torch.randn(1, 150, 1, 16, device=device)
    lists = BlockKeep(ints(0, 1, 1, 3, device=device), ints(2, 0, 1, device=device), 64, 64)
    torch.testing.assert_close(compiled(q, lists), kernels.mixed_attention(q, q, q, block_keep=lists))
    lists.blocks[2] = 7
    with pytest.raises(ValueError, match=r"block_keep: expected key blocks in \[0, 3\) of 64 keys, got 7"):
        compiled(q, lists)


# --- launches ---------------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize(
    "offsets,blocks",
    [
        ([0, 2, 1], [0, 1]), ([0, 9, 999], [0, 1]), ([-7, 1, 2], [0, 1]), ([0, 1], [0]), ([0, 2, 4], [7, 9, -3, 5]),
        ([0, 2, 4], [1, 0, 1, 1]), ([0, 1, 2], [2**31 - 1, -(2**31)]), ([0, 0, 0], []),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("keys", [40, 70, 128])
def test_wrong_lists_stay_within_the_tensor(device, offsets, blocks, keys):
    """With the value checks below the launch, nothing outside of the keys and the lists is read."""
    from specedit_kernels import gpu

    padded = torch.full((3 * keys, 1, 16), torch.nan, device=device, dtype=torch.float16)
    padded[keys : 2 * keys] = 1
    k = padded[keys : 2 * keys][None]
    q = torch.ones(1, 100, 1, 16, device=device, dtype=torch.float16)
    around = torch.full((len(blocks) + 2000,), 10**6, dtype=torch.int32, device=device)
    around[1000 : 1000 + len(blocks)] = ints(*blocks)
    numbers = around[1000 : 1000 + len(blocks)]
    args = (q, k, k, None, None, None, None, 0.25, True, ints(*offsets, device=device), numbers, 64, 64)
    out, _ = gpu.run("mixed_attention", args)
    assert bool(((out == 0) | (out == 1)).all())


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("sizes,tile", [((128, 128), (128, 64)), ((64, 192), (64, 64)), ((320, 256), (64, 64))])
def test_tiles_divide_the_blocks(sizes, tile):
    from specedit_kernels.gpu.attention_blocks import tile_of

    assert tile_of(sizes, 128, 64) == tile
    assert tile_of(sizes, 16, 16) == (16, 16)


@pytest.mark.thorough
@pytest.mark.skipif(not HAS_TRITON or INTERPRETING, reason="needs Triton, not interpreting")
@pytest.mark.parametrize("capability,path", [(80, "ptr"), (90, "tma"), (100, "tma")])
def test_lists_keep_the_loads_ahead(capability, path):
    """The compiled loop has as many buffers as without lists, its matrix instructions, and no spills."""
    from specedit_kernels import compile_check

    shipped, label = compile_check.shipped(capability), f"attend bf16 D64 {path}"
    found = {variant.name: (file, variant) for file, variant in shipped if variant.name.startswith(label)}
    names = [name for name in found if "lists" in name]
    assert {name.removeprefix(label).split(" lists")[0] for name in names} == {" packed bias lse", " dense"}
    file, plain = found[f"{label} dense"]
    tile = "{BLOCK_M}x{BLOCK_N}".format(**plain.constants)
    want = compile_check.check(plain, capability, file)
    got = compile_check.check(found[f"{label} dense lists {tile}"][1], capability, file)
    assert got.problems == want.problems == [] and got.matrix_instructions == want.matrix_instructions
    assert want.shared <= got.shared < want.shared + 1024

"""What only a GPU can show: compiled kernels at sizes from life, on streams, in graphs, and without a host sync.

The other files of this folder run on a GPU as well, each kernel beside plain PyTorch; here is what an interpreter
cannot stand in for.
"""

import math
import os

import pytest
import torch

import specedit_kernels as kernels
from specedit_kernels import ops, ready, reference, tune, verdict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
    ),
]
HALVES = [torch.bfloat16, torch.float16]
LOG4 = math.log(4)


def attention_inputs(g, dtype, lengths, heads, dim, hidden=0.0):
    """Packed inputs on the GPU; `lengths` are pairs (keys of area 4, keys of area 1), queries and keys alike."""
    counts = [a + b for a, b in lengths]
    q, k, v = (torch.randn(sum(counts), heads, dim, generator=g, device="cuda").to(dtype) for _ in range(3))
    bias = torch.cat([torch.tensor([LOG4] * a + [0.0] * b) for a, b in lengths]).cuda()
    bias[torch.rand(bias.shape, generator=g, device="cuda") < hidden] = -math.inf
    cu = torch.tensor([0, *counts]).cumsum(0).to("cuda", torch.int32)
    return q, k, v, cu, bias


def softmax_attention(q, k, v, cu_q, cu_k, bias, dtype, seen=None):
    """Attention written out head by head in `dtype`; float64 is the exact result, the inputs' dtype the yardstick.

    `seen` has a boolean (H, N, K) per sequence, at least as large, with what each query reads.
    """
    out = torch.zeros(q.shape, dtype=dtype, device="cuda")
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=dtype, device="cuda")
    for i, (a, b, c, d) in enumerate(zip(*(x.tolist()[i:] for x in (cu_q, cu_k) for i in (0, 1)))):
        if a == b or c == d:
            continue
        for h in range(q.shape[1]):
            logits = (q[a:b, h].to(dtype) @ k[c:d, h].to(dtype).T) * q.shape[-1] ** -0.5 + bias[c:d].to(dtype)
            if seen is not None:
                logits = logits.masked_fill(~seen[i][h, : b - a, : d - c], -math.inf)
            row = logits.logsumexp(-1)
            weights = torch.exp(logits - row.masked_fill(row == -math.inf, 0)[:, None])
            out[a:b, h] = weights @ v[c:d, h].to(dtype)
            lse[h, a:b] = row
    return out, lse


def generator(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


LIFE = {  # per sequence: keys that stand for four positions, keys that stand for one
    "draft": [(0, 1024)],
    "coarse": [(0, 2560)],
    "mixed": [(1638, 2150)],
    "full": [(0, 8704)],
    "two halves of CFG": [(1638, 1850), (1638, 1650)],
    "batch of 8 masks": [(2048 - 102 * i, 512 + 408 * i) for i in range(8)],
}


@pytest.mark.parametrize("case", LIFE)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_at_realistic_sizes(as_good, case, half, dim):
    q, k, v, cu, bias = attention_inputs(generator(), half, LIFE[case], 2, dim)
    exact = softmax_attention(q, k, v, cu, cu, bias, torch.float64)
    same = softmax_attention(q, k, v, cu, cu, bias, half)
    out, lse = kernels.mixed_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, key_bias=bias, return_lse=True)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])
    if len(cu) == 2:
        dense = kernels.mixed_attention(q[None], k[None], v[None], key_bias=bias[None])
        as_good(dense[0], exact[0], same[0])


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("seed", range(200))
def test_random_ragged_batches(as_good, seed, half):
    """Queries and keys of lengths apart, empty sequences, hidden keys; head dims of every padded size."""
    g = generator(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape or (1,), generator=g, device="cuda")

    batch, heads, dim = int(draw(1, 9)), int(draw(1, 4)), (16, 32, 64, 96, 128, 256)[int(draw(0, 6))]
    lengths = draw(0, 700, 2, batch) * (torch.rand(2, batch, generator=g, device="cuda") > 0.2)
    cu_q, cu_k = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
    q = torch.randn(int(cu_q[-1]), heads, dim, generator=g, device="cuda").to(half)
    k, v = (torch.randn(int(cu_k[-1]), heads, dim, generator=g, device="cuda").to(half) for _ in range(2))
    bias = torch.randn(k.shape[0], generator=g, device="cuda")
    bias[torch.rand(bias.shape, generator=g, device="cuda") < 0.2] = -math.inf
    exact = softmax_attention(q, k, v, cu_q, cu_k, bias, torch.float64)
    same = softmax_attention(q, k, v, cu_q, cu_k, bias, half)
    out, lse = kernels.mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, return_lse=True)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
)


def with_every_pingpong_tile(as_good, q, k, v, cu_q, cu_k, bias):
    from specedit_kernels import gpu

    exact = softmax_attention(q, k, v, cu_q, cu_k, bias, torch.float64)
    same = softmax_attention(q, k, v, cu_q, cu_k, bias, q.dtype)
    for config in tune.candidates(tune.PINGPONG, {"head_dim": q.shape[-1]}):
        arguments = (q, k, v, cu_q, cu_k, None, bias, q.shape[-1] ** -0.5, True)
        order = (*gpu.order(bias, cu_k, config["block_n"]), config["block_n"])
        for planned in ((), (None, None, 0, 0, None, 0, *order)):
            out, lse = gpu.run("mixed_attention", (*arguments, *planned), {tune.PINGPONG: config})
            as_good(out, exact[0], same[0])
            as_good(lse, exact[1], same[1])


@needs_hopper
@pytest.mark.parametrize("case", LIFE)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_pingpong_tiles_at_realistic_sizes(as_good, case, half, dim):
    q, k, v, cu, bias = attention_inputs(generator(), half, LIFE[case], 2, dim, hidden=0.1)
    with_every_pingpong_tile(as_good, q, k, v, cu, cu, bias)


@needs_hopper
@pytest.mark.parametrize("seed", range(30))
def test_pingpong_tiles_of_random_ragged_batches(as_good, seed):
    """Sequences without keys, without queries, and with fewer keys than a block."""
    g = generator(seed)
    lengths = torch.randint(0, 400, (2, 6), generator=g, device="cuda") // (1 + torch.arange(6, device="cuda") ** 2)
    cu_q, cu_k = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
    dim = (64, 128)[seed % 2]
    q, k, v = (torch.randn(int(n[-1]) + 1, 2, dim, generator=g, device="cuda").bfloat16() for n in (cu_q, cu_k, cu_k))
    bias = torch.randn(len(k), generator=g, device="cuda")
    cu_q[-1] += 1  # at least one row of each
    cu_k[-1] += 1
    with_every_pingpong_tile(as_good, q, k, v, cu_q, cu_k, bias)


def random_lists(g, queries, keys, size, heads=None, share=0.3):
    """Lists of a packed batch with as many blocks as its lengths have, on the GPU."""
    lead = () if heads is None else (heads,)
    masks = [torch.rand(*lead, -(-n // size), -(-m // size), generator=g, device="cuda") < share
             for n, m in zip(queries, keys)]  # fmt: skip
    return masks, kernels.BlockKeep.from_masks(masks, query_block=size, key_block=size)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", ["coarse", "two halves of CFG", "batch of 8 masks"])
def test_block_lists_at_realistic_sizes(as_good, monkeypatch, case, half, dim, size):
    q, k, v, cu, bias = attention_inputs(generator(), half, LIFE[case], 2, dim)
    counts = [a + b for a, b in LIFE[case]]
    masks, keep = random_lists(generator(1), counts, counts, size, heads=2)
    arguments = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "key_bias": bias, "return_lse": True}
    out, lse = kernels.mixed_attention(q, k, v, **arguments, block_keep=keep)
    seen = [mask.repeat_interleave(size, 1).repeat_interleave(size, 2) for mask in masks]
    exact = softmax_attention(q, k, v, cu, cu, bias, torch.float64, seen)
    same = softmax_attention(q, k, v, cu, cu, bias, half, seen)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])
    every = [torch.ones_like(mask) for mask in masks]
    monkeypatch.setattr(verdict, "uses_pingpong", lambda device: False)  # which has other tiles, and no lists
    ready.forget()
    all_kept = kernels.BlockKeep.from_masks(every)
    got = kernels.mixed_attention(q, k, v, **arguments, block_keep=all_kept)
    for a, b in zip(got, kernels.mixed_attention(q, k, v, **arguments)):
        assert torch.equal(a, b)


def test_lists_are_made_and_read_without_the_host():
    """No sync, and a graph that replays with another mask."""
    g = generator()
    q = torch.randn(1, 1000, 2, 64, generator=g, device="cuda").bfloat16()
    mask = torch.rand(1, 2, 8, 8, generator=g, device="cuda") < 0.4

    def attend():
        return kernels.mixed_attention(q, q, q, block_keep=kernels.BlockKeep.from_mask(mask))

    attend()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for share in (0.0, 0.5, 1.0):
        mask.copy_(torch.rand(mask.shape, generator=g, device="cuda") < share)
        graph.replay()
        assert torch.equal(out, attend())


def edit_step(x, index, noise, q, weight, cos, sin, place, joint, cu, bias):
    """Every operator once, in the order of an edit: rows out, to fine, back, in; queries placed; attention."""
    picked = kernels.gather_tokens(x, index)
    fine, fine_sigma = kernels.expand_tokens(picked, 0.5, noise=noise)
    coarse, _ = kernels.contract_tokens(fine, fine_sigma)
    rows = kernels.scatter_tokens(coarse, index, x.clone())
    joint = [t.clone() for t in joint]
    jq, jk, jv = kernels.qk_norm_rope(q, q, weight, weight, cos, sin, v=q, out_index=place, out=joint)
    out = kernels.mixed_attention(jq, jk, jv, cu_seqlens_q=cu, cu_seqlens_k=cu, key_bias=bias)
    return fine, rows, jq, jk, jv, out


def edit_inputs(seed, tokens=40, length=101, dtype=torch.bfloat16):
    g = generator(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    index = torch.randperm(tokens, generator=g, device="cuda")[: tokens // 2]
    place = torch.randperm(length, generator=g, device="cuda")
    angles = randn(length, 32, dtype=torch.float32)
    ends = torch.randint(0, length + 1, (3,), generator=g, device="cuda").sort().values
    cu = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), length)]).to(torch.int32)
    joint = [randn(length, 2, 64) for _ in range(3)]
    noise = randn(2, len(index), 4, 16, 3, dtype=torch.float32)
    x, q, weight, bias = randn(2, tokens, 64), randn(length, 2, 64), randn(64), randn(length, dtype=torch.float32)
    return [x, index, noise, q, weight, angles.cos(), angles.sin(), place, joint, cu, bias]


def flat(arguments):
    return [t for a in arguments for t in (a if isinstance(a, list) else [a])]


def on_the_cpu(arguments):
    return [[t.cpu() for t in a] if isinstance(a, list) else a.cpu() for a in arguments]


@pytest.mark.parametrize("precision", [*HALVES, torch.float32], ids=str)
def test_every_kernel_once(precision):
    """A small step through every kernel (compute-sanitizer runs this one), beside the CPU's."""

    arguments = edit_inputs(1, dtype=precision)
    want = edit_step(*on_the_cpu(arguments))
    tolerance = 1e-5 if precision == torch.float32 else 4 * torch.finfo(precision).eps
    for got, expected in zip(edit_step(*arguments), want):
        torch.testing.assert_close(got.cpu(), expected, atol=tolerance, rtol=tolerance)
    stack, weights = torch.randn(4, 7, 33, device="cuda").to(precision), torch.randn(4, device="cuda")
    summed = ops.run("triton", "weighted_sum", (stack, weights))
    torch.testing.assert_close(
        summed.cpu(), reference.weighted_sum(stack.cpu(), weights.cpu()), atol=tolerance, rtol=tolerance
    )
    seed = torch.tensor([7], device="cuda")
    q = arguments[3][None]
    lists = kernels.BlockKeep.from_mask(torch.eye(2, device="cuda").bool(), query_block=64, key_block=64)
    host = kernels.BlockKeep(lists.offsets.cpu(), lists.blocks.cpu(), 64, 64)
    kept = kernels.mixed_attention(q, q, q, block_keep=lists)
    same = kernels.mixed_attention(*[q.cpu()] * 3, block_keep=host)
    torch.testing.assert_close(kept.cpu(), same, atol=tolerance, rtol=tolerance)
    drawn = ops.run("triton", "expand_tokens", (arguments[0], 0.5, None, seed, None))
    noise = reference.philox_noise(seed, (2, 40, 4, 16, 3))
    same, _ = reference.expand_tokens(arguments[0], 0.5, noise=noise)
    torch.testing.assert_close(drawn, same, atol=tolerance, rtol=tolerance)
    noise = reference.philox_noise(seed, (2, 40, 64, 3), patch=1)
    for given in ((noise, None), (None, seed)):
        drawn = ops.run("triton", "expand_tokens", (arguments[0], 0.5, *given, None, 1))
        same, _ = reference.expand_tokens(arguments[0], 0.5, noise=noise, patch=1)
        torch.testing.assert_close(drawn, same, atol=tolerance, rtol=tolerance)
    merged = ops.run("triton", "contract_tokens", (same, 2 / 3, 1))
    torch.testing.assert_close(merged, arguments[0], atol=2 * tolerance, rtol=2 * tolerance)


def test_a_graph_replays_with_other_lengths_and_indices():
    """Captured once; then indices, places, cu_seqlens and values change under it, empty sequences included."""
    arguments = edit_inputs(0)
    edit_step(*arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = edit_step(*arguments)
    for seed in range(1, 8):
        for old, new in zip(flat(arguments), flat(edit_inputs(seed))):
            old.copy_(new)
        graph.replay()
        for got, want in zip(out, edit_step(*arguments)):
            assert torch.equal(got, want)


def test_no_host_sync():
    arguments = edit_inputs(2)
    generators = [torch.Generator().manual_seed(1), torch.Generator("cuda").manual_seed(1)]
    edit_step(*arguments)
    for g in generators:
        kernels.expand_tokens(arguments[0], 0.5, generator=g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        edit_step(*arguments)
        for g in generators:
            kernels.expand_tokens(arguments[0], 0.5, generator=g)
        kernels.mixed_attention(*(arguments[8][i][None] for i in range(3)), key_bias=arguments[10][None])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_expand_and_norm_rope_are_one_launch():
    """Nothing but the kernel itself runs on the device, whatever is given."""
    x, _, _, q, weight, cos, sin, place, joint, *_ = edit_inputs(6)
    noise = torch.randn(2, 40, 4, 16, 3, device="cuda")
    calls = (
        lambda: kernels.expand_tokens(x, 0.5, noise=noise, detail=noise),
        lambda: kernels.qk_norm_rope(q, q, weight, weight, cos, sin, v=q, out_index=place, out=joint),
    )
    for call in calls:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(ran) == 1, ran


def test_work_runs_on_the_current_stream():
    """The inputs are filled late on a side stream: a launch on any other stream would read what was there before."""
    arguments, late = edit_inputs(3), edit_inputs(4)
    want = edit_step(*late)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(flat(arguments), flat(late)):
            old.copy_(new)
        out = edit_step(*arguments)
    side.synchronize()
    for got, expected in zip(out, want):
        assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors():
    arguments = edit_inputs(5)
    want = edit_step(*arguments)
    other = [[t.to("cuda:1") for t in a] if isinstance(a, list) else a.to("cuda:1") for a in arguments]
    assert torch.cuda.current_device() == 0
    for got, expected in zip(edit_step(*other), want):
        assert got.device == torch.device("cuda:1") and torch.equal(got.cpu(), expected.cpu())


def test_inductor_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(edit_step, fullgraph=True, dynamic=True)
    for seed, (tokens, length) in enumerate(((40, 101), (62, 150), (90, 333))):
        arguments = edit_inputs(seed, tokens, length)
        for got, want in zip(compiled(*arguments), edit_step(*arguments)):
            torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 20 << 30, reason="needs 20 GB")
def test_offsets_beyond_32_bits():
    """Rows, samples and heads that begin behind the 2^31st element."""
    base = torch.zeros((2 << 30) + (1 << 20), dtype=torch.float16, device="cuda")
    table = base[: 1 << 31].view(-1, 64)
    index = torch.tensor([0, table.shape[0] - 1, 5], device="cuda")
    rows = torch.randn(3, 64, device="cuda").half()
    kernels.scatter_tokens(rows, index, table)
    assert torch.equal(kernels.gather_tokens(table, index), rows) and torch.equal(table[-1], rows[1])
    for shape, stride in (((3, 40, 2, 64), (1 << 30, 128, 64, 1)), ((1, 40, 3, 64), (1 << 30, 64, 1 << 30, 1))):
        q = base.as_strided(shape, stride)
        q.copy_(torch.randn(shape, device="cuda"))
        bias = torch.randn(shape[:2], device="cuda")
        want = kernels.mixed_attention(*[q.contiguous()] * 3, key_bias=bias)
        assert torch.equal(kernels.mixed_attention(q, q, q, key_bias=bias), want)
    for shape, stride in (((3, 40, 2, 64), (1 << 30, 128, 64, 1)), ((1, 40, 3, 64), (1 << 30, 64, 1 << 30, 1))):
        weight, angles = torch.ones(64, device="cuda").half(), torch.rand(*shape[:2], 32, device="cuda")
        q = base.as_strided(shape, stride)
        q.copy_(torch.randn(shape, device="cuda"))
        want = kernels.qk_norm_rope(*[q.contiguous()] * 2, weight, weight, angles.cos(), angles.sin())
        for got, expected in zip(kernels.qk_norm_rope(q, q, weight, weight, angles.cos(), angles.sin()), want):
            assert torch.equal(got, expected)

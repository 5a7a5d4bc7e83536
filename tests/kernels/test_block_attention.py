"""mixed_attention over lists of key blocks, against softmax attention with the mask written out in float64."""

import itertools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from specedit_kernels import BlockKeep, available_backends, mixed_attention
from tests.kernels.shipped import attention_entries

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def randn(g, device, dtype, *shape):
    return torch.randn(shape, generator=g).to(device, dtype)


def ceil_div(a, b):
    return -(-a // b)


def random_mask(g, *shape, share=0.5):
    return torch.rand(shape, generator=g) < share


def masked_attention(q, k, v, seen, bias, dtype):
    """One sequence, q (N, H, D), k and v (K, H_kv, D), seen (H, N, K), bias (K,) or None -> out, lse (H, N)."""
    q = q.to(dtype).transpose(0, 1)
    k, v = (x.to(dtype).transpose(0, 1).repeat_interleave(q.shape[0] // x.shape[1], dim=0) for x in (k, v))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits.masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -math.inf)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
    return (weights @ v).transpose(0, 1), lse


def seen_by_tokens(mask, queries, keys, heads, sizes):
    """A mask of blocks (R, K) or (H, R, K) as one of tokens (H, N, K)."""
    wide = mask.repeat_interleave(sizes[0], dim=-2).repeat_interleave(sizes[1], dim=-1)[..., :queries, :keys]
    return wide.expand(heads, queries, keys)


def check_dense(backend, as_good, q, k, v, mask, bias, sizes):
    """Output and lse of one dense call against every sample's exact ones; mask (R, K) or (B or 1, H or 1, R, K).

    Without a bias also of a call without lse; test_packed has such a one with a bias.
    """
    keep = BlockKeep.from_mask(mask.to(q.device), query_block=sizes[0], key_block=sizes[1])
    out, lse = mixed_attention(q, k, v, key_bias=bias, block_keep=keep, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and out.is_contiguous()
    only = out if bias is not None else mixed_attention(q, k, v, block_keep=keep, backend=backend)
    every = mask.expand(q.shape[0], *mask.shape[1:]) if mask.dim() == 4 else mask.expand(q.shape[0], *mask.shape)
    for b in range(q.shape[0]):
        seen = seen_by_tokens(every[b], q.shape[1], k.shape[1], q.shape[2], sizes).to(q.device)
        part = q[b], k[b], v[b], seen, None if bias is None else bias[b]
        (exact, exact_lse), (same, same_lse) = (masked_attention(*part, t) for t in (torch.float64, q.dtype))
        as_good(out[b], exact, same)
        as_good(only[b], exact, same)
        as_good(lse[b], exact_lse, same_lse)


# Samples and heads of the mask, and heads of the keys: every lead once, and per-head masks over shared keys too.
LEADS = [((), 4), ((1, 1), 2), ((2, 1), 4), ((1, 4), 2), ((2, 4), 4), ((2, 4), 2)]


@pytest.mark.parametrize("lead, heads", LEADS, ids=str)
def test_dense_half(backend, device, rng, as_good, lead, heads):
    q = randn(rng, device, torch.float16, 2, 150, 4, 32)
    k, v = (randn(rng, device, torch.float16, 2, 230, heads, 32) for _ in range(2))
    bias = torch.randn(2, 230, generator=rng).to(device) if heads == 2 else None
    mask = random_mask(rng, *lead, 3, 4)
    mask[..., 1, :] = False
    check_dense(backend, as_good, q, k, v, mask, bias, (64, 64))


@pytest.mark.parametrize("sizes", [(64, 128), (128, 64), (192, 64), (64, 320)], ids=str)
def test_block_sizes_and_precisions(backend, dtype, device, rng, as_good, sizes):
    q = randn(rng, device, dtype, 1, 70, 1, 64)
    k, v = (randn(rng, device, dtype, 1, 330, 1, 64) for _ in range(2))
    mask = random_mask(rng, ceil_div(70, sizes[0]), ceil_div(330, sizes[1]))
    mask[0, -1] = True  # the partial block
    check_dense(backend, as_good, q, k, v, mask, torch.randn(1, 330, generator=rng).to(device), sizes)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128])
def test_lengths_around_a_block(backend, device, rng, as_good, keys):
    q = randn(rng, device, torch.float16, 1, 65, 1, 16)
    k, v = (randn(rng, device, torch.float16, 1, keys, 1, 16) for _ in range(2))
    blocks = ceil_div(keys, 64)
    for kept in itertools.product((False, True), repeat=blocks):
        mask = torch.tensor([[True] * blocks, kept])
        check_dense(backend, as_good, q, k, v, mask, None, (64, 64))


RAGGED = [([70, 0, 3, 130], [65, 40, 129, 1]), ([5], [9]), ([0, 33], [17, 0]), ([0, 0], [0, 4])]


@pytest.mark.parametrize(
    "lengths, with_bias, per_head",
    [
        (RAGGED[0], False, True), (RAGGED[0], True, False), (RAGGED[1], True, True), (RAGGED[1], False, False),
        (RAGGED[2], False, False), (RAGGED[2], True, True), (RAGGED[3], False, True), (RAGGED[3], True, False),
    ],
    ids=str,
)  # fmt: skip
def test_packed(backend, device, rng, as_good, lengths, with_bias, per_head):
    dtype, heads = torch.float16, 2
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    q = randn(rng, device, dtype, sum(lengths[0]), heads, 16)
    k, v = (randn(rng, device, dtype, sum(lengths[1]), 1, 16) for _ in range(2))
    bias = torch.randn(k.shape[0], generator=rng).to(device) if with_bias else None
    lead = (heads,) if per_head else ()
    masks = [random_mask(rng, *lead, ceil_div(n, 64), ceil_div(m, 64)).to(device) for n, m in zip(*lengths)]
    keep = BlockKeep.from_masks(masks, query_block=64, key_block=64)
    arguments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "key_bias": bias, "block_keep": keep, "backend": backend}
    out, lse = mixed_attention(q, k, v, max_seqlen_q=max(lengths[0]), **arguments, return_lse=True)
    only = mixed_attention(q, k, v, **arguments)
    assert out.shape == q.shape and lse.shape == (heads, q.shape[0])
    ends = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), masks)
    for (a, b), (c, d), mask in ends:
        seen = seen_by_tokens(mask, b - a, d - c, heads, (64, 64))
        part = q[a:b], k[c:d], v[c:d], seen, None if bias is None else bias[c:d]
        (exact, exact_lse), (same, same_lse) = (masked_attention(*part, t) for t in (torch.float64, dtype))
        as_good(out[a:b], exact, same)
        as_good(only[a:b], exact, same)
        as_good(lse[:, a:b], exact_lse, same_lse)


def test_many_sequences(backend, device, rng):
    """More than the 128 whose query blocks are counted at once; few of them have queries."""
    lengths = [1 if i in (0, 3, 127, 128, 133) else 0 for i in range(134)]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    q, k, v = (randn(rng, device, torch.float16, sum(lengths), 1, 16) for _ in range(3))
    masks = [torch.tensor([[i % 2 == 0]], device=device)[:n, :n] for i, n in enumerate(lengths)]
    keep = BlockKeep.from_masks(masks, query_block=64, key_block=64)
    out = mixed_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, block_keep=keep, backend=backend)
    kept = torch.tensor([True, False, False, True, False], device=device)
    assert torch.equal(out, torch.where(kept[:, None, None], v, 0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_everything_kept_is_the_dense_result_bit_for_bit(backend, dtype, device, rng, packed, extras):
    # Tiles of 16 take long in the interpreter.
    queries, keys, size = (20, 70, 64) if dtype == torch.float32 else (150, 140, 128)
    q = randn(rng, device, dtype, 2, queries, 2, 32)
    k, v = (randn(rng, device, dtype, 2, keys, 1, 32) for _ in range(2))
    bias = torch.randn(2, keys, generator=rng).to(device) if extras else None
    arguments = {"return_lse": extras, "backend": backend}
    mask = torch.ones(2, 2, ceil_div(queries, size), 2, dtype=torch.bool, device=device)
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bias = None if bias is None else bias.flatten()
        arguments |= {f"cu_seqlens_{name}": torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device)
                      for name, n in (("q", queries), ("k", keys))}  # fmt: skip
        mask = mask[0].repeat(1, 2, 1)
    want = mixed_attention(q, k, v, key_bias=bias, **arguments)
    keep = BlockKeep.from_mask(mask, query_block=size, key_block=size)
    got = mixed_attention(q, k, v, key_bias=bias, block_keep=keep, **arguments)
    for a, b in zip(got, want) if extras else [(got, want)]:
        assert torch.equal(a, b)


def test_nothing_kept_and_no_tokens(backend, device, rng):
    for queries, keys in ((70, 130), (1, 1), (0, 130), (70, 0), (0, 0)):
        q = randn(rng, device, torch.float16, 1, queries, 2, 16)
        k = randn(rng, device, torch.float16, 1, keys, 2, 16)
        mask = torch.zeros(ceil_div(queries, 64), ceil_div(keys, 64), dtype=torch.bool, device=device)
        keep = BlockKeep.from_mask(mask, query_block=64, key_block=64)
        out, lse = mixed_attention(q, k, k, block_keep=keep, return_lse=True, backend=backend)
        assert out.shape == q.shape and not out.any() and bool((lse == -math.inf).all())
        assert not mixed_attention(q, k, k, block_keep=keep, backend=backend).any()


def test_one_query_and_one_key(backend, device, rng):
    q, k, v = (randn(rng, device, torch.float16, 1, 1, 2, 16) for _ in range(3))
    keep = BlockKeep.from_mask(torch.ones(1, 1, dtype=torch.bool, device=device))
    assert torch.equal(mixed_attention(q, k, v, block_keep=keep, backend=backend), v)


def test_keys_that_are_not_kept_are_not_read(backend, device, rng):
    """NaN in them reaches no query."""
    q, k, v = (randn(rng, device, torch.float16, 1, 300, 2, 32) for _ in range(3))
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:, [1, 4]] = True
    keep = BlockKeep.from_mask(mask.to(device), query_block=64, key_block=64)
    want = mixed_attention(q, k, v, block_keep=keep, backend=backend)
    hidden = [x.clone() for x in (k, v)]
    for x in hidden:
        x[:, :64] = x[:, 128:256] = math.nan
    got = mixed_attention(q, *hidden, block_keep=keep, backend=backend)
    assert want.isfinite().all() and torch.equal(got, want)


def test_views(backend, device, rng):
    """Lists, bias, queries and keys with strides; behind the lists is what no row covers."""
    base = randn(rng, device, torch.float32, 100, 3, 4, 2, 32)
    q, k, v = (base[:, i, ::2, 1][None] for i in range(3))
    bias = torch.randn(200, generator=rng).to(device)[::2][None]
    numbers = torch.tensor([[0, 9], [1, 9], [1, 9], [7, 9]], dtype=torch.int32, device=device)[:, 0]
    ends = torch.tensor([[0, 9], [2, 9], [3, 9]], dtype=torch.int32, device=device)[:, 0]
    keep = BlockKeep(ends, numbers, 64, 64)
    straight = BlockKeep(ends.clone(), numbers.clone()[:3], 64, 64)
    got = mixed_attention(q, k, v, key_bias=bias, block_keep=keep, backend=backend)
    want = mixed_attention(*(x.contiguous() for x in (q, k, v)), key_bias=bias.contiguous(), block_keep=straight,
                           backend="torch")  # fmt: skip
    torch.testing.assert_close(got, want)
    alone = mixed_attention(q[:, 64:], k[:, 64:], v[:, 64:], key_bias=bias[:, 64:], backend="torch")
    torch.testing.assert_close(got[:, 64:], alone)


def test_rows_may_share_entries(backend, device, rng):
    """Offsets need not start at 0: the heads of each pair read the same part of `blocks`."""
    q, k, v = (randn(rng, device, torch.float16, 1, 60, 4, 16) for _ in range(3))
    k, v = (torch.cat([x, -x, x.flip(1)], dim=1) for x in (k, v))
    offsets = torch.tensor([[[1, 3], [1, 3], [0, 1], [0, 1]]], dtype=torch.int32, device=device)
    blocks = torch.tensor([1, 0, 2], dtype=torch.int32, device=device)
    got = mixed_attention(q, k, v, block_keep=BlockKeep(offsets, blocks, 64, 64), backend=backend)
    mask = torch.zeros(1, 4, 1, 3, dtype=torch.bool, device=device)
    mask[:, :2, :, [0, 2]] = mask[:, 2:, :, 1] = True
    keep = BlockKeep.from_mask(mask, query_block=64, key_block=64)
    assert torch.equal(got, mixed_attention(q, k, v, block_keep=keep, backend=backend))


def check_random_batch(backend, as_good, device, seed):
    """Every choice that the kernel depends on, drawn from a seed."""
    g = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    heads, shared = draw((1, 1), (2, 1), (2, 2))
    batch, queries, keys, dim = draw(1, 2), draw(1, 64, 100, 200), draw(1, 64, 100, 270), draw(16, 32, 48)
    sizes = draw(64, 128), draw(64, 128)
    lead = draw((), (draw(1, batch), draw(1, heads)))
    q = randn(g, device, torch.float16, batch, queries, heads, dim)
    k, v = (randn(g, device, torch.float16, batch, keys, shared, dim) for _ in range(2))
    bias = None
    if draw(False, True):
        bias = torch.randn(batch, keys, generator=g)
        bias[torch.rand(bias.shape, generator=g) < 0.2] = -math.inf
        bias = bias.to(device)
    mask = random_mask(g, *lead, ceil_div(queries, sizes[0]), ceil_div(keys, sizes[1]), share=draw(0.2, 0.5, 0.9))
    check_dense(backend, as_good, q, k, v, mask, bias, sizes)


RANDOM = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5, **RANDOM)
def test_random_batches(backend, device, as_good, seed):
    check_random_batch(backend, as_good, device, seed)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10 if INTERPRETING else 30, **RANDOM)  # slower there by far
def test_more_random_batches(backend, device, as_good, seed):
    check_random_batch(backend, as_good, device, seed)


@pytest.mark.parametrize("lead", [(), (1, 2)], ids=str)
def test_plain_pytorch_computes_what_is_kept_only(rng, lead):
    """A quarter of the blocks is a quarter of the multiplications."""
    # An operator is one call to the counter, whose inside it sees only for a gradient.
    q, k, v = (torch.randn(1, 512, 2, 16, generator=rng).requires_grad_() for _ in range(3))
    place = torch.rand((*lead, 8, 8), generator=rng).argsort(-1)
    for kept in (8, 4, 2, 0):
        keep = BlockKeep.from_mask(place < kept, query_block=64, key_block=64)
        with FlopCounterMode(display=False) as counter:
            mixed_attention(q, k, v, block_keep=keep, return_lse=True, backend="torch")
        assert counter.get_total_flops() == 4 * 512 * 512 * 2 * 16 * kept // 8


@pytest.mark.parametrize("lse", [False, True])
def test_derivatives_come_from_plain_pytorch(device, rng, lse):
    q, k, v = (torch.randn(1, 70, 2, 4, generator=rng, dtype=torch.float64, device="cpu") for _ in range(3))
    mask = torch.tensor([[[[True, False], [True, True]], [[False, False], [False, True]]]])
    keep = BlockKeep.from_mask(mask, query_block=64, key_block=64)
    seen = seen_by_tokens(mask[0], 70, 70, 2, (64, 64))
    weight = torch.randn(q.shape, generator=rng, dtype=torch.float64)

    def ours(*inputs):
        out = mixed_attention(*inputs, block_keep=keep, return_lse=lse, backend="torch")
        return ((out[0] if lse else out) * weight).sum()

    def dense(q, k, v):
        logits = torch.einsum("nhd,khd->hnk", q[0], k[0]) / 2
        shown = torch.where(seen, logits.exp(), 0)
        out = torch.einsum("hnk,khd->nhd", shown / shown.sum(-1, keepdim=True).clamp_min(1e-30), v[0])
        return (out[None] * weight).sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(dense(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(ours(*leaves), leaves), want):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.func.grad(ours, (0, 1, 2))(q, k, v), want):
        torch.testing.assert_close(a, b)
    got = torch.func.jvp(ours, (q, k, v), (k, v, q))[1]
    torch.testing.assert_close(got, sum((a * b).sum() for a, b in zip(want, (k, v, q))))
    stacked = torch.func.vmap(lambda x: mixed_attention(x, k, v, block_keep=keep, backend="torch"))(torch.stack([q, k]))
    torch.testing.assert_close(stacked[1], mixed_attention(k, k, v, block_keep=keep, backend="torch"))


@pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")
def test_kernels_refuse_to_lose_a_derivative(device):
    q = torch.zeros(1, 5, 1, 16, device=device, requires_grad=True)
    keep = BlockKeep.from_mask(torch.ones(1, 1, dtype=torch.bool, device=device))
    with pytest.raises(RuntimeError, match=r"expected torch.no_grad\(\), got a tensor that requires a gradient"):
        mixed_attention(q, q, q, block_keep=keep, backend="triton")


@pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("kernel,entry", attention_entries())
def test_every_attention_configuration(device, rng, as_good, kernel, entry):
    """Packed lists through each shipped tile, by descriptors and by pointers; with everything kept, bit for bit."""
    from specedit_kernels import gpu

    if device.type == "cuda" and kernel == "attention_tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    half = torch.bfloat16 if kernel == "attention_tma" else torch.float16
    dim, dtype = entry["shape"]["head_dim"], half if entry["shape"]["bits"] == 16 else torch.float32
    lengths = ([3, 20], [10, 140]) if entry["config"]["block_m"] < 64 else ([10, 140], [60, 270])
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    q, k, v = (randn(rng, device, dtype, sum(n), 1, dim) for n in (lengths[0], *[lengths[1]] * 2))
    bias = torch.randn(k.shape[0], generator=rng).to(device)
    arguments = (q, k, v, cu_q, cu_k, None, bias, dim**-0.5, True)
    for size in (64, 128):
        masks = [random_mask(rng, ceil_div(n, size), ceil_div(m, size)) for n, m in zip(*lengths)]
        keep = BlockKeep.from_masks([mask.to(device) for mask in masks], query_block=size, key_block=size)
        given_lists = (keep.offsets, keep.blocks, size, size)
        out, lse = gpu.run("mixed_attention", (*arguments, *given_lists), {kernel: entry["config"]})
        host = [x.cpu() for x in (q.double(), k.double(), v.double(), cu_q, cu_k, bias)]
        lists = BlockKeep.from_masks(masks, query_block=size, key_block=size)
        exact, exact_lse = mixed_attention(*host[:3], cu_seqlens_q=host[3], cu_seqlens_k=host[4], key_bias=host[5],
                                           block_keep=lists, return_lse=True)  # fmt: skip
        as_good(lse.cpu(), exact_lse, exact_lse.float())
        assert (out.cpu().double() - exact).abs().max().item() < 16 * torch.finfo(dtype).eps
    every = BlockKeep.from_masks([torch.ones_like(mask, device=device) for mask in masks])
    kept = gpu.run("mixed_attention", (*arguments, every.offsets, every.blocks, 128, 128), {kernel: entry["config"]})
    plain = gpu.run("mixed_attention", arguments, {kernel: entry["config"]})
    assert torch.equal(kept[0], plain[0]) and torch.equal(kept[1], plain[1])

"""mixed_attention over lists of key blocks, against FlexAttention's block mask and a dense run, by the share kept.

    pytest benchmarks/test_block_attention.py --results benchmarks/results/kernels_block_attention.json

Without a GPU, the cases are smaller.
"""

import functools

import pytest
import torch

from benchmarks.kernel_harness import DEVICE, DTYPE, ON_GPU, TOLERANCE, measure
from specedit_kernels import BlockKeep, mixed_attention

HEADS, DIM = (24, 128) if ON_GPU else (2, 64)
TOKENS, BLOCK = (8704, 128) if ON_GPU else (2048, 64)  # a 1024 px edit at full resolution
ROWS = TOKENS // BLOCK
SHARES = (1.0, 0.5, 0.25, 0.1)
# One mask for all heads, as a region gives, or one for each, as predicted from queries and keys.
LEADS = {"shared": (1, 1), "per head": (1, HEADS)}


def make_inputs(share, lead):
    """Queries, keys, values, and a mask in which every row keeps the same number of blocks, its own one included."""
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(3))
    scores = torch.rand(*lead, ROWS, ROWS, device=DEVICE)
    scores.diagonal(dim1=-2, dim2=-1).fill_(-1)
    return q, k, v, scores.argsort(-1).argsort(-1) < round(share * ROWS)


@functools.lru_cache(maxsize=32)
def _lists(mask):
    """Made once for a mask: a method keeps its lists for several steps."""
    return BlockKeep.from_mask(mask, query_block=BLOCK, key_block=BLOCK)


def ours(q, k, v, mask):
    return mixed_attention(q, k, v, block_keep=_lists(mask))


def ours_with_new_lists(q, k, v, mask):
    lists = BlockKeep.from_mask(mask, query_block=BLOCK, key_block=BLOCK)
    return mixed_attention(q, k, v, block_keep=lists)


def every_key(q, k, v, mask):
    return mixed_attention(q, k, v)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=32)
def _block_mask(mask):
    from torch.nn.attention.flex_attention import BlockMask

    counts = mask.sum(-1, dtype=torch.int32)
    order = (~mask).to(torch.int32).argsort(dim=-1, stable=True).to(torch.int32)
    # Kept blocks are full ones, which need no mask inside.
    none = torch.zeros_like(counts), torch.zeros_like(order)
    return BlockMask.from_kv_blocks(*none, counts, order, BLOCK_SIZE=BLOCK, seq_lengths=(TOKENS, TOKENS))


def flex(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=_block_mask(mask)).transpose(1, 2)


PROVIDERS = {
    "specedit_kernels": ours,
    "specedit_kernels with new lists": ours_with_new_lists,
    "specedit_kernels, every key": every_key,
    "FlexAttention block mask": flex,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("share", SHARES)
@torch.inference_mode()
def test_block_attention(benchmark, roofs, rows, share, lead, provider):
    dense = PROVIDERS[provider] is every_key

    def exact(q, k, v, mask):
        """Head by head in float64, so that the logits fit in memory."""
        heads = []
        for h in range(HEADS):
            q1, k1, v1 = (x[0, :, h].double() for x in (q, k, v))
            logits = q1 @ k1.T * DIM**-0.5
            if not dense:
                own = mask[0, h % mask.shape[1]]
                logits.masked_fill_(~own.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1), -torch.inf)
            heads.append(torch.softmax(logits, dim=-1) @ v1)
        return torch.stack(heads, dim=1)[None]

    kept = 1.0 if dense else round(share * ROWS) / ROWS
    row = {"op": "mixed_attention_blocks", "case": f"{share:.0%} kept, {lead}", "provider": provider, "share": share}
    rows.append(measure(
        benchmark, row, lambda: make_inputs(share, LEADS[lead]), PROVIDERS[provider], exact, roofs,
        flops=kept * 4 * TOKENS**2 * HEADS * DIM, tolerance=TOLERANCE,
    ))  # fmt: skip

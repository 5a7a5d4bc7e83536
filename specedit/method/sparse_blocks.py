"""Which blocks of keys matter to each block of queries: predicted from their means (arXiv 2502.18137, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specedit_kernels import BlockKeep

QUERY_BLOCK, KEY_BLOCK = 128, 64  # b_q and b_k of the paper


@dataclass(eq=False)
class BlockPredictor:
    """Predicts the key blocks that an attention call reads, and counts the pairs that it kept.

    theta, tau, top: as in `kept_blocks`. pairs: of every call since `take_share`, those kept, () float64, and all.
    known: lengths of packed sequences, by the tensor that has them.
    """

    theta: float
    tau: float | None = None
    top: float | None = None
    pairs: list[tuple[Tensor, float]] = field(default_factory=list)
    known: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what it counts is state
    def dense(self, q: Tensor, k: Tensor) -> BlockKeep:
        """For queries (B, N_q, H, D) and keys (B, N_k, H, D)."""
        return BlockKeep.from_mask(self._mask(q, k), query_block=QUERY_BLOCK, key_block=KEY_BLOCK)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def packed(self, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> BlockKeep:
        """For queries (T_q, H, D) and keys (T_k, H, D) of packed sequences."""
        each = zip(q.split(self._lengths(cu_seqlens_q)), k.split(self._lengths(cu_seqlens_k)), strict=True)
        masks = [self._mask(one[None], other[None])[0] for one, other in each]
        return BlockKeep.from_masks(masks, query_block=QUERY_BLOCK, key_block=KEY_BLOCK)

    def _lengths(self, ends: Tensor) -> list[int]:
        """The lengths of packed sequences; the host waits for them once."""
        if id(ends) not in self.known:
            self.known[id(ends)] = (ends, ends.diff().tolist())
        return self.known[id(ends)][1]

    def _mask(self, q: Tensor, k: Tensor) -> Tensor:
        mask = kept_blocks(q, k, theta=self.theta, tau=self.tau, top=self.top)
        lengths = [block_lengths(x.shape[1], size, q.device) for x, size in ((q, QUERY_BLOCK), (k, KEY_BLOCK))]
        kept = torch.einsum("bhrk,r,k->", mask.double(), *lengths)
        self.pairs.append((kept, float(q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])))
        return mask

    def take_share(self) -> Tensor:
        """() float64: kept pairs over all pairs of queries and keys since the last time."""
        kept, total = zip(*self.pairs, strict=True)
        self.pairs = []
        share: Tensor = torch.stack(kept).sum() / sum(total)
        return share


def kept_blocks(
    q: Tensor, k: Tensor, *, theta: float, tau: float | None = None, top: float | None = None,
    sizes: tuple[int, int] = (QUERY_BLOCK, KEY_BLOCK),
) -> Tensor:  # fmt: skip
    """(B, H, R, K) bool: the key blocks that each query block reads, from q (B, N_q, H, D) and k (B, N_k, H, D).

    Every block is represented by its mean, keys around the mean of all keys. The softmax of the means' products is the
    compressed attention map. Of each row it keeps the largest entries, as long as they sum up to at most `tau`, or the
    share `top` of all entries; in any case one. A block whose tokens have a mean cosine similarity of at most `theta`
    has no representative: as queries it reads everything, as keys it is read by all, and takes no part in the softmax.
    tau=1 and top=1 keep everything.
    """
    queries, similar_q = representatives(q, sizes[0])
    keys, similar_k = representatives(k - k.mean(1, keepdim=True), sizes[1])
    fixed = ~(similar_q > theta)[..., :, None] | ~(similar_k > theta)[..., None, :]
    if (tau if top is None else top) == 1:
        return torch.ones_like(fixed)
    logits = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    attention = logits.masked_fill(~(similar_k > theta)[..., None, :], -torch.inf).softmax(-1)
    values, order = attention.sort(-1, descending=True)
    rank = torch.arange(values.shape[-1], device=q.device)
    if top is None:
        number = (values.cumsum(-1) <= tau).sum(-1, keepdim=True).clamp_min(1)
        chosen = rank < number
    else:
        chosen = (rank < max(1, int(top * len(rank)))).expand_as(values)
    return torch.zeros_like(fixed).scatter(-1, order, chosen) | fixed


def representatives(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means (B, H, R, D) float32 of the blocks of x (B, N, H, D), and the mean cosine similarity (B, H, R) of each
    block's tokens, with themselves included. The last block may be shorter."""
    lengths = block_lengths(x.shape[1], size, x.device).float()[:, None]

    def means(rows: Tensor) -> Tensor:
        padded: Tensor = F.pad(rows, (0, 0, 0, -rows.shape[2] % size)).unflatten(2, (-1, size))
        return padded.sum(3) / lengths

    rows = x.float().transpose(1, 2)
    # The mean of all products of unit vectors is the squared length of their mean.
    return means(rows), means(F.normalize(rows, dim=-1)).square().sum(-1)


def block_lengths(tokens: int, size: int, device: torch.device) -> Tensor:
    """(R,) float64: how many tokens each block has."""
    starts = torch.arange(0, tokens, size, device=device, dtype=torch.float64)
    return (tokens - starts).clamp_max(size)

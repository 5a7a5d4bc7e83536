"""Launches of `attention.attend`: which tensors are copied, which launch parameters, which grid."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import launch
from .attention import attend
from .attention_blocks import BlockLists, tile_of
from .attention_plan import Schedule
from .prepared import Descriptor, Launch

Result = tuple[torch.Tensor, torch.Tensor | None]


def with_batch(tensor: torch.Tensor) -> torch.Tensor:
    """A packed or dense tensor as (B, N, H, D), copied only where its strides would slow the kernel down or break it.

    Rows that cannot be loaded in 16-byte vectors make the kernel spill; a copy is cheap next to attention. Strides of
    2^22 and above could overflow the 32-bit offsets within a block.
    """
    tensor = tensor if tensor.dim() == 4 else tensor[None]
    sample, row, head, channel = tensor.stride()
    # Triton specialises strides that are multiples of 16 elements; TMA needs multiples of 16 bytes.
    vectors = channel == 1 and (sample | row | head) % 16 == 0 and tensor.data_ptr() % 16 == 0
    if row < 1 << 22 and (vectors or fits_descriptor(tensor)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def fits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether TMA can read the tensor: address and strides aligned to 16 bytes, innermost stride 1."""
    sample, row, head, channel = tensor.stride()
    aligned = (sample | row | head) * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and channel == 1 and sample > 0 and row > 0 and head > 0 and tensor.numel() > 0


def check_head_dim(dtype: torch.dtype, dim: int) -> None:
    if dim % 16 or dim > 256:
        raise ValueError(f'q: expected a head dim that is a multiple of 16 up to 256, got {dim}; use backend="torch"')
    if dtype == torch.float32 and dim > 128:
        raise ValueError(f'q: expected a head dim up to 128 in float32, got {dim}; use backend="torch"')


def parameters(
    device: torch.device, itemsize: int, dim: int, keys: int, aligned: bool, tuned: dict[str, launch.Config] | None
) -> tuple[launch.Config, bool]:
    """Launch parameters for `keys` per sequence, and whether they are for descriptors.

    On Hopper and newer, half precision loads through TMA where every tensor is aligned for it.
    """
    shape = {"bits": 8 * itemsize, "head_dim": launch.next_power_of_2(dim), "keys": keys}
    config = launch.config("attention_tma", device, tuned, **shape) if itemsize == 2 and aligned else None
    if config is not None:
        return config, True
    return launch.shipped_config("attention", device, tuned, **shape), False


class Call(NamedTuple):
    """Arguments of the operator `mixed_attention`, and of the one that writes into `out` and `lse`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int | None
    key_bias: torch.Tensor | None
    scale: float | None
    return_lse: bool
    block_offsets: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    query_block: int = 0
    key_block: int = 0
    query_tiles: torch.Tensor | None = None
    tile_rows: int = 0
    key_order: torch.Tensor | None = None
    key_counts: torch.Tensor | None = None
    tile_bias: torch.Tensor | None = None
    tile_keys: int = 0
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    @property
    def sequences(self) -> int:
        """How many are packed; 1 for a dense batch."""
        return 1 if self.cu_seqlens_k is None else self.cu_seqlens_k.shape[0] - 1

    @property
    def lists(self) -> BlockLists | None:
        if self.block_offsets is None or self.blocks is None:
            return None
        return BlockLists(self.block_offsets, self.blocks, self.query_block, self.key_block)


class PreparedAttention:
    """Launches attention on tensors like those of one call."""

    def __init__(self, call: Call, tuned: dict[str, launch.Config] | None) -> None:
        launch.check_dtype("q", call.q)
        check_head_dim(call.q.dtype, call.q.shape[-1])
        q, k, v = four = [with_batch(x) for x in call[:3]]
        self._copied = [x.data_ptr() != source.data_ptr() for x, source in zip(four, call[:3])]
        batch, queries, heads, dim = q.shape
        keys, sequences = k.shape[1], call.sequences
        self._lse_shape = (heads, queries) if call.q.dim() == 3 else (batch, heads, queries)
        aligned = all(fits_descriptor(x) for x in four)
        config, descriptors = parameters(q.device, q.element_size(), dim, keys // sequences, aligned, tuned)
        block_m, block_n = config["block_m"], config["block_n"]
        if (lists := call.lists) is not None:
            block_m, block_n = tile_of((call.query_block, call.key_block), block_m, block_n)
        self._schedule, tiles = self._tiles(call, queries, keys, block_m)
        self._empty = not tiles * call.q.numel()
        dim_p2, packed = launch.next_power_of_2(dim), call.cu_seqlens_q is not None
        described = {}
        if descriptors and not self._empty:
            described = {3 + i: Descriptor(x, (block_m, block_n, block_n)[i], dim_p2) for i, x in enumerate(four)}
        self._described = bool(described)
        bias = call.key_bias if call.key_bias is None or call.key_bias.dim() == 2 else call.key_bias[None]
        scale = 1 / math.sqrt(dim) if call.scale is None else float(call.scale)
        group = heads // max(1, k.shape[2])  # Triton specialises 1, so equal head counts cost nothing
        strides = (stride for x in four for stride in x.stride())
        self._sizes = (
            tiles, heads, group, queries, keys, scale * math.log2(math.e), *strides,
            *((0, 0) if bias is None else bias.stride()),
        )  # fmt: skip
        alike = call.key_order is not None and call.tile_keys == block_n and lists is None
        self._ordered = alike and bias is not None and scale > 0
        self._switches = (
            dim, dim_p2, block_m, block_n, packed, packed and sequences > 1, descriptors, bias is not None,
            bias is not None or not scale > 0, call.return_lse, "ieee" if q.dtype == torch.float32 else "tf32",
            lists is not None, call.query_block, call.key_block, self._ordered,
            # Past the end of a packed sequence a descriptor would read the next one's rows.
            bool(config.get("masked_tail")) and lists is None and not (self._ordered or (packed and descriptors)),
        )  # fmt: skip
        options = {name: config[name] for name in ("num_warps", "num_stages")}
        self._launch = Launch(attend, (tiles * heads * batch, 1, 1), described, **options)

    def _tiles(self, call: Call, queries: int, keys: int, block_m: int) -> tuple[Schedule | None, int]:
        """What orders the query blocks, or None if the call brings their order or needs none; and their number."""
        tiles = launch.ceil_div(queries, block_m)
        if call.cu_seqlens_q is not None and call.sequences > 1:
            if call.query_tiles is not None and call.tile_rows == block_m:
                return None, call.query_tiles.shape[0]
            schedule = Schedule(call.sequences, queries, keys, call.max_seqlen_q, block_m)
            return schedule, schedule.capacity
        if call.max_seqlen_q is not None:
            tiles = min(tiles, launch.ceil_div(call.max_seqlen_q, block_m))
        return None, tiles

    def __call__(self, *args: Any) -> Result:
        """The output, and the lse if the call wants it."""
        call = Call(*args)
        q, k, v, cu_q, cu_k, _, bias, *_ = args
        out, lse = call.out, call.lse
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if call.return_lse and lse is None:
            lse = torch.empty(self._lse_shape, dtype=torch.float32, device=q.device)
        if self._empty:
            return out, lse
        if True in self._copied:
            q, k, v = (x.clone(memory_format=torch.contiguous_format) if copied else x
                       for x, copied in zip((q, k, v), self._copied))  # fmt: skip
        table = call.query_tiles
        if cu_q is not None:
            cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
            if self._schedule is not None:
                table = self._schedule(cu_q, cu_k)
        described = (q, k, v) if self._described else (None, None, None)
        lists = call.lists
        listed = (None,) * 6 if lists is None else lists.arguments()
        order = (call.key_order, call.key_counts, call.tile_bias) if self._ordered else (None, None, None)
        self._launch(
            q, k, v, *described, bias, out, lse, cu_q, cu_k, table, *self._sizes, *listed, *order, *self._switches
        )
        return out, lse


def prepare_attention(*args: Any, tuned: dict[str, launch.Config] | None = None) -> PreparedAttention:
    return PreparedAttention(Call(*args), tuned)

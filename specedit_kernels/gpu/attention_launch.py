"""Launches of `attend` and `attend_pingpong`: which tensors are copied, which launch parameters, which grid."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from . import launch
from .attention import attend
from .attention_blocks import BlockLists, tile_of
from .attention_plan import Schedule
from .attention_split import LARGEST_DIM, LEAST_BLOCKS, Left, Parts, Split, split_of
from .prepared import Descriptor, Launch

Result = tuple[torch.Tensor, torch.Tensor | None]
PLAIN, TMA, PINGPONG = "attention", "attention_tma", "attention_pingpong"  # tables of launch parameters
NO_LISTS, NO_ORDER = (None,) * 6, (None,) * 3  # in place of block lists and of a plan's order of keys
PINGPONG_DIMS = (64, 128)  # head dims, rounded up to a power of 2, that leave its warpgroups enough registers
PINGPONG_CAPABILITY = 90


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


@functools.cache
def _warn(said: str) -> None:
    """Once for each text."""
    warnings.warn(f"specedit_kernels: {said}", stacklevel=2)


@functools.cache
def _why_no_gluon() -> str | None:
    try:
        from . import attention_pingpong  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon is another: {error}"
    return None


def why_no_pingpong() -> str | None:
    """Why the ping-pong kernel does not run on the current device with this Triton, or None."""
    if launch.interpreting():
        return "Triton's interpreter runs no Gluon"
    arch = driver.active.get_current_target().arch
    if arch != PINGPONG_CAPABILITY:
        return f"expected sm_{PINGPONG_CAPABILITY}, got sm_{arch}"
    return _why_no_gluon()


def pingpong_shapes(device: torch.device) -> list[tuple[int, int]]:
    """Head dims and keys for which the device's file names the ping-pong kernel; none where it does not run."""
    if why_no_pingpong() is not None:
        return []
    shapes = [entry["shape"] for entry in launch.entries(PINGPONG, device)]
    return [(shape["head_dim"], shape["keys"]) for shape in shapes]


def split_shapes(device: torch.device) -> list[tuple[int, int, int]]:
    """Head dim, keys, and queries of one head whose last round is split, where the device's file asks for that."""
    found = []
    for kernel in (PLAIN, TMA):
        for entry in launch.entries(kernel, device):
            config, shape = entry["config"], entry["shape"]
            if config.get("resident") and shape["bits"] == 16 and shape["head_dim"] <= LARGEST_DIM:
                slots = config["resident"] * launch.processors(device)
                keys = max(shape.get("keys", 0), 2 * LEAST_BLOCKS * config["block_n"])
                found.append((shape["head_dim"], keys, slots * config["block_m"] + 1))
    return found


class Choice(NamedTuple):
    """A kernel, by the table of its launch parameters, and these."""

    kernel: str
    config: launch.Config


def parameters(
    device: torch.device, itemsize: int, dim: int, keys: int, aligned: bool, tuned: dict[str, launch.Config] | None,
    pingpong: bool = False,
) -> Choice:  # fmt: skip
    """The kernel for `keys` per sequence.

    On Hopper and newer, half precision loads through TMA where every tensor is aligned for it. With `pingpong` it may
    be the ping-pong kernel, where the device's file says so.
    """
    shape = {"bits": 8 * itemsize, "head_dim": launch.next_power_of_2(dim), "keys": keys}
    if itemsize == 2 and aligned:
        if pingpong and shape["head_dim"] in PINGPONG_DIMS:
            config = launch.config(PINGPONG, device, tuned, **shape)
            why = None if config is None else why_no_pingpong()
            if config is not None and why is None:
                return Choice(PINGPONG, config)
            if why is not None:
                _warn(f"the launch parameters name {PINGPONG}, which does not run here: {why}. The plain kernel does.")
        config = launch.config(TMA, device, tuned, **shape)
        if config is not None:
            return Choice(TMA, config)
    return Choice(PLAIN, launch.shipped_config(PLAIN, device, tuned, **shape))


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

    def __init__(self, call: Call, tuned: dict[str, launch.Config] | None, pingpong: bool) -> None:
        launch.check_dtype("q", call.q)
        check_head_dim(call.q.dtype, call.q.shape[-1])
        q, k, v = four = [with_batch(x) for x in call[:3]]
        self._copied = [x.data_ptr() != source.data_ptr() for x, source in zip(four, call[:3])]
        batch, queries, heads, dim = q.shape
        keys, lists = k.shape[1], call.lists
        self._lse_shape = (heads, queries) if call.q.dim() == 3 else (batch, heads, queries)
        aligned = all(fits_descriptor(x) for x in four)
        kernel, config = parameters(
            q.device, q.element_size(), dim, keys // call.sequences, aligned, tuned, pingpong and lists is None
        )
        block_m, block_n = config["block_m"], config["block_n"]
        if lists is not None:
            block_m, block_n = tile_of((call.query_block, call.key_block), block_m, block_n)
        self._schedule, tiles = self._tiles(call, queries, keys, block_m)
        self._empty = not tiles * call.q.numel()
        bias = call.key_bias if call.key_bias is None or call.key_bias.dim() == 2 else call.key_bias[None]
        scale = 1 / math.sqrt(dim) if call.scale is None else float(call.scale)
        group = heads // max(1, k.shape[2])  # Triton specialises 1, so equal head counts cost nothing
        self._sizes: tuple[int | float, ...] = (tiles, heads, group, queries, keys, scale * math.log2(math.e))
        self._bias_strides = (0, 0) if bias is None else bias.stride()
        self._switches: tuple[Any, ...] = ()
        self._parts: Parts | None = None
        self._rest: tuple[Any, ...] | None = None  # the arguments after the tensors, where they are always the same
        grid, scale_first = (tiles * heads * batch, 1, 1), bias is not None or not scale > 0
        self._pingpong = kernel == PINGPONG
        if self._pingpong:
            self._prepare_pingpong(call, four, config, grid, scale_first)
        else:
            self._prepare_plain(call, four, kernel == TMA, config, (block_m, block_n), grid, scale_first)

    def _prepare_plain(
        self, call: Call, four: list[torch.Tensor], tma: bool, config: launch.Config, blocks: tuple[int, int],
        grid: tuple[int, int, int], scale_first: bool,
    ) -> None:  # fmt: skip
        dim, (block_m, block_n) = call.q.shape[-1], blocks
        dim_p2, packed = launch.next_power_of_2(dim), call.cu_seqlens_q is not None
        described = {}
        if tma and not self._empty:
            described = {3 + i: Descriptor(x, (block_m, block_n, block_n)[i], dim_p2) for i, x in enumerate(four)}
        self._described = bool(described)
        self._sizes += (*(stride for x in four for stride in x.stride()), *self._bias_strides)
        self._ordered = self._has_order(call, block_n)
        split = None if self._empty else self._split(call, config, grid[0], block_n)
        if split is not None:
            grid = (split.start + split.blocks * split.parts, 1, 1)
            tiles, (queries, heads) = int(self._sizes[0]), call.q.shape[-3:-1]
            self._parts = Parts(split, tiles, heads, queries, dim, block_m, packed, call.return_lse)
        self._switches = (
            dim, dim_p2, block_m, block_n, packed, packed and call.sequences > 1, tma, call.key_bias is not None,
            scale_first, call.return_lse, "ieee" if call.q.dtype == torch.float32 else "tf32",
            call.lists is not None, call.query_block, call.key_block, self._ordered,
            # Past the end of a packed sequence a descriptor would read the next one's rows.
            bool(config.get("masked_tail")) and call.lists is None and not (self._ordered or (packed and tma)),
            split is not None,
        )  # fmt: skip
        if call.lists is None and split is None and not self._ordered:
            self._rest = self._after_tensors(call, Left())
        options = {name: config[name] for name in ("num_warps", "num_stages")}
        self._launch = Launch(attend, grid, described, **options)

    def _prepare_pingpong(
        self, call: Call, four: list[torch.Tensor], config: launch.Config, grid: tuple[int, int, int],
        scale_first: bool,
    ) -> None:  # fmt: skip
        """Two warpgroups have half of the rows each, so the queries' descriptor has half a block."""
        from .attention_pingpong import attend_pingpong, tile_layout

        dim, block_m, block_n = call.q.shape[-1], config["block_m"], config["block_n"]
        dim_p2, packed = launch.next_power_of_2(dim), call.cu_seqlens_q is not None
        described, rows = {}, (block_m // 2, block_n, block_n)
        if not self._empty:
            described = {i: Descriptor(x, rows[i], dim_p2, tile_layout(dim_p2)) for i, x in enumerate(four)}
        self._sizes += (*four[2].stride()[1:3], *self._bias_strides)
        self._ordered = self._has_order(call, block_n)
        self._switches = (
            dim, dim_p2, block_m, block_n, config["num_stages"], packed, packed and call.sequences > 1,
            call.key_bias is not None, scale_first, call.return_lse, self._ordered,
        )  # fmt: skip
        self._launch = Launch(attend_pingpong, grid, described, num_warps=4)

    @staticmethod
    def _split(call: Call, config: launch.Config, programs: int, block_n: int) -> Split | None:
        """How to split the last round, if the parameters say how many programs run at once and all are equally long."""
        resident = config.get("resident", 0)
        if not resident or call.lists is not None or call.sequences > 1 or call.q.shape[-1] > LARGEST_DIM:
            return None
        keys = call.k.shape[-3]
        return split_of(programs, resident * launch.processors(call.q.device), launch.ceil_div(keys, block_n))

    def _has_order(self, call: Call, block_n: int) -> bool:
        """Whether the call brings an order of blocks of so many keys that the kernel can use."""
        alike = call.key_order is not None and call.tile_keys == block_n and call.lists is None
        return alike and call.key_bias is not None and self._sizes[5] > 0  # the scale

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
        if self._pingpong:
            order = self._order(call)
            self._launch(q, k, v, v, bias, out, lse, cu_q, cu_k, table, *self._sizes, *order, *self._switches)
            return out, lse
        described = (q, k, v) if self._described else (None, None, None)
        rest, parts, left = self._rest, self._parts, Left()
        if rest is None:
            if parts is not None:
                left = parts.empty(q.device)
            rest = self._after_tensors(call, left)
        self._launch(q, k, v, *described, bias, out, lse, cu_q, cu_k, table, *rest)
        if parts is not None:
            parts.join(left, out, lse, cu_q)
        return out, lse

    def _after_tensors(self, call: Call, left: Left) -> tuple[Any, ...]:
        """The arguments of `attend` from `tiles` on."""
        lists = call.lists
        listed = NO_LISTS if lists is None else lists.arguments()
        return (*self._sizes, *listed, *self._order(call), *left, *self._switches)

    def _order(self, call: Call) -> tuple[torch.Tensor | None, ...]:
        return (call.key_order, call.key_counts, call.tile_bias) if self._ordered else NO_ORDER


def prepare_attention(
    *args: Any, tuned: dict[str, launch.Config] | None = None, pingpong: bool = False
) -> PreparedAttention:
    return PreparedAttention(Call(*args), tuned, pingpong)

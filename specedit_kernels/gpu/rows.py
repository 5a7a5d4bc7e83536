"""Gathers and scatters rows, with one kernel for both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import launch
from .prepared import Launch


@triton.jit(do_not_specialize=[
    "rows", "table_rows", "source_sample", "source_row", "index_sample", "target_sample", "target_row",
], do_not_specialize_on_alignment=["index"])  # fmt: skip
def copy_rows(
    source, index, target, rows, table_rows,
    source_sample, source_row, source_channel, index_sample, index_row, target_sample, target_row, target_channel,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """gather:  target[b, m, :] = source[b, index[b, m], :]
    scatter: target[b, index[b, m], :] = source[b, m, :]

    Strides of samples and rows are in vectors of VECTOR channels, so that the compiler knows how wide loads may be. If
    an index is out of range, a gathered row becomes 0 and a scattered row is not written.
    """
    channel_tiles: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    channel = (pid % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)  # [BC]
    m = (pid // channel_tiles % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR]
    sample = (pid // channel_tiles // row_tiles).to(tl.int64)

    picked = tl.load(index + sample * index_sample + m.to(tl.int64) * index_row, mask=m < rows, other=-1)  # [BR]
    picked = picked.to(tl.int64)
    found = (picked >= 0) & (picked < table_rows)  # [BR]
    if SCATTER:
        source_at, target_at = m.to(tl.int64), picked
        readable, writable = found, found
    else:
        source_at, target_at = picked, m.to(tl.int64)
        readable, writable = found, m < rows
    in_row = (channel < CHANNELS)[None, :]  # [1, BC]
    source_at = (sample * source_sample + source_at * source_row) * VECTOR  # [BR]
    target_at = (sample * target_sample + target_at * target_row) * VECTOR  # [BR]
    source_channels = channel.to(tl.int64)[None, :] * source_channel
    target_channels = channel.to(tl.int64)[None, :] * target_channel
    # [BR, BC]
    values = tl.load(source + source_at[:, None] + source_channels, mask=readable[:, None] & in_row, other=0)
    tl.store(target + target_at[:, None] + target_channels, values, mask=writable[:, None] & in_row)


def _batched(tensor: torch.Tensor, dims: int, batch: int) -> torch.Tensor:
    """A view with a leading axis of `batch`, of stride 0 if all samples share the tensor."""
    return tensor.expand(batch, *tensor.shape[-(dims - 1) :]) if tensor.dim() < dims else tensor


def tile(config: launch.Config, channels: int, itemsize: int) -> tuple[int, int]:
    """Rows and channels of a program's tile, both powers of two."""
    block_channels = min(launch.next_power_of_2(channels), config["block_bytes"] // itemsize)
    return max(1, config["tile_bytes"] // (block_channels * itemsize)), block_channels


def _prepare(
    source: torch.Tensor,
    index: torch.Tensor,
    target: torch.Tensor | None,
    tuned: dict[str, launch.Config] | None,
    *,
    scatter: bool,
) -> Callable[..., None]:
    """What launches the kernel on tensors like these: source and target (B, N, C), index (B, M). No target: a
    contiguous one that only its own launch will have."""
    (batch, rows), channels, size = index.shape, source.shape[2], source.element_size()
    table = source if target is None or not scatter else target
    if batch * rows * channels == 0:
        return lambda source, index, target: None
    strides = (rows * channels, channels, 1) if target is None else target.stride()
    sizes = [channels, *source.stride()[:2], *strides[:2]]
    contiguous = source.stride(2) == 1 and strides[2] == 1
    pointers = [source] if target is None else [source, target]
    vector = launch.vector_width(size, pointers, sizes) if contiguous else 1
    config = launch.shipped_config("copy_rows", source.device, tuned, row_bytes=channels * size)
    block_rows, block_channels = tile(config, channels, size)
    programs = batch * launch.ceil_div(rows, block_rows) * launch.ceil_div(channels, block_channels)
    (source_sample, source_row, source_channel), (target_sample, target_row, target_channel) = (
        (sample // vector, row // vector, channel) for sample, row, channel in (source.stride(), strides)
    )
    fixed = (
        rows, table.shape[1], source_sample, source_row, source_channel, *index.stride(), target_sample, target_row,
        target_channel, channels, vector, scatter, block_rows, block_channels,
    )  # fmt: skip
    start = Launch(copy_rows, (programs, 1, 1), num_warps=config["num_warps"])
    return lambda source, index, target: start(source, index, target, *fixed)


def prepare_gather(
    x: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor | None = None,
    tuned: dict[str, launch.Config] | None = None,
) -> Callable[..., torch.Tensor]:
    """What launches the kernel on tensors like these."""
    batch = x.shape[0] if x.dim() == 3 else index.shape[0] if index.dim() == 2 else 1
    lead = (batch,) if x.dim() == 3 or index.dim() == 2 else ()
    shape = (*lead, index.shape[-1], x.shape[-1])
    target = None if out is None else _batched(out, 3, batch)
    start = _prepare(_batched(x, 3, batch), _batched(index, 2, batch), target, tuned, scatter=False)

    def call(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = x.new_empty(shape) if out is None else out
        start(x, index, y)
        return y

    return call


def prepare_scatter(
    src: torch.Tensor, index: torch.Tensor, out: torch.Tensor, tuned: dict[str, launch.Config] | None = None
) -> Callable[..., None]:
    """What launches the kernel on tensors like these."""
    batch = out.shape[0] if out.dim() == 3 else 1
    return _prepare(_batched(src, 3, batch), _batched(index, 2, batch), _batched(out, 3, batch), tuned, scatter=True)

"""Whether tensors share memory, exactly, from addresses, shapes and strides.

Kernels write in no order, so what they write must be memory of its own. Two elements of strided tensors are the same
where a sum of steps, each an integer in a range times a stride, equals the distance of the tensors. Strides of views
are nested: with the largest stride first, only one or two multiples of it can still reach that distance.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

Step = tuple[int, int, int]  # stride, lowest and highest multiple


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last-plus-one address; (0, 0) for tensors without memory (meta, empty, inside torch.func)."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return 0, 0
    if not start or not tensor.numel():
        return 0, 0
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape))
    return start, start + (last + 1) * tensor.element_size()


def _solvable(steps: Iterable[Step], target: int) -> bool:
    """Whether `target` is a sum of one multiple of each stride."""
    merged: dict[int, tuple[int, int]] = {}
    for stride, low, high in steps:
        a, b = merged.get(stride, (0, 0))
        merged[stride] = a + low, b + high
    return _reaches([(stride, *merged[stride]) for stride in sorted(merged, reverse=True)], target)


def _reaches(steps: list[Step], target: int) -> bool:
    if not steps:
        return target == 0
    (stride, low, high), rest = steps[0], steps[1:]
    below, above = (sum(step[0] * step[end] for step in rest) for end in (1, 2))
    first, last = max(low, -((above - target) // stride)), min(high, (target - below) // stride)
    return any(_reaches(rest, target - stride * count) for count in range(first, last + 1))


def _bytes(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """A tensor's axes of length above 1, and the bytes of an element, as (stride, length - 1) in bytes."""
    size = tensor.element_size()
    axes = [(stride * size, n - 1) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1 and stride]
    return [*axes, (1, size - 1)]


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the tensors share a byte."""
    (start, stop), (other_start, other_stop) = _span(a), _span(b)
    if other_start >= stop or start >= other_stop or a.device != b.device:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    steps = [(stride, 0, n) for stride, n in _bytes(a)] + [(stride, -n, 0) for stride, n in _bytes(b)]
    return _solvable(steps, other_start - start)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of the tensor share memory."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    axes = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1)
    if axes[0][0] == 0:
        return True
    covered = 0  # the last element that previous axes reach
    nested = True
    for stride, n in axes:
        nested = nested and stride > covered
        covered += stride * (n - 1)
    # Otherwise two elements that coincide differ along some axis, maybe along those before it, not along those after.
    return not nested and any(
        _solvable([*((other, 1 - m, m - 1) for other, m in axes[:at]), (stride, 1, n - 1)], 0)
        for at, (stride, n) in enumerate(axes)
    )


def clearly_apart(written: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
    """Whether the written tensors are contiguous, and their address ranges disjoint; faster than `share_memory` for
    each pair."""
    others = [_span(tensor) for tensor in read]
    for tensor in written:
        if not tensor.is_contiguous():
            return False
        start, stop = span = _span(tensor)
        for other, end in others:
            if other < stop and start < end:
                return False
        others.append(span)
    return True


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both tensors have the same elements at the same addresses."""
    return _span(a) == _span(b) and a.shape == b.shape and a.stride() == b.stride()

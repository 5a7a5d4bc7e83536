"""Whether tensors share memory, exactly, from addresses, shapes and strides. Kernels write in no order.

Two elements of strided tensors are the same where a sum of steps, each an integer in a range times a stride, equals the
distance of the tensors. Strides of views are nested, so that trying the largest stride first leaves one or two choices.
"""

from __future__ import annotations

import torch

Step = tuple[int, int, int]  # stride in bytes, lowest and highest multiple


def _address(tensor: torch.Tensor) -> int:
    """Where the tensor's memory begins; 0 for tensors without memory of their own (meta, empty, inside torch.func)."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _solvable(steps: list[Step], target: int) -> bool:
    """Whether `target` is a sum of multiples of the strides; the steps come with the largest stride first."""
    if not steps:
        return target == 0
    (stride, low, high), rest = steps[0], steps[1:]
    below, above = (sum(step * (a, b)[end] for step, a, b in rest) for end in (0, 1))
    first, last = max(low, -((above - target) // stride)), min(high, (target - below) // stride)
    return any(_solvable(rest, target - stride * count) for count in range(first, last + 1))


def _steps(tensor: torch.Tensor, sign: int) -> list[Step]:
    """The bytes of a tensor as steps from its address, in the given direction."""
    size = tensor.element_size()
    sizes = [(stride * size, n - 1) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1 and stride]
    return [(stride, min(0, sign * n), max(0, sign * n)) for stride, n in [*sizes, (1, size - 1)]]


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether some byte belongs to both tensors."""
    first, second = _address(a), _address(b)
    if not first or not second or a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    steps = sorted(_steps(a, 1) + _steps(b, -1), reverse=True)
    return _solvable(steps, second - first)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of the tensor are the same memory."""
    axes = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1)
    if tensor.numel() == 0 or not axes:
        return False
    if axes[0][0] == 0:
        return True
    # Two elements differ along some axis first, by at least one there and by anything along the others.
    for at, (stride, n) in enumerate(axes):
        steps = [(other, 1 - m, m - 1) for i, (other, m) in enumerate(axes) if i < at]
        if _solvable(sorted([*steps, (stride, 1, n - 1)], reverse=True), 0):
            return True
    return False


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both tensors are the same elements in the same places."""
    return _address(a) == _address(b) and a.shape == b.shape and a.stride() == b.stride()

"""Keys grouped by their bias, for attention that is merged from one pass per bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import checks

MOST = 8  # biases; every one is a pass over the queries


class NotMergeable(ValueError):
    """The keys have more biases than merged attention takes, or some that are not numbers."""


@dataclass(frozen=True, eq=False)
class KeyGroups:
    """The keys of every bias: the `key_groups` of `mixed_attention(backend="merged")`. Made by `KeyGroups.of`.

    Attributes:
        values: the biases, -inf left out.
        rows: for each, int64 (n,), the keys that have it, ascending. They count within the sequence if all samples
            share them, else through all samples or packed sequences.
        ends: for each, int32 (B + 1,), `cu_seqlens` of these keys; () if all samples share them.
        complete: for each, whether every sequence has such keys.
        keys: number of keys that `rows` count through.
        offsets: `cu_seqlens_k` of packed keys, None of dense ones.
    """

    values: tuple[float, ...]
    rows: tuple[torch.Tensor, ...]
    ends: tuple[torch.Tensor, ...]
    complete: tuple[bool, ...]
    keys: int
    offsets: torch.Tensor | None = None

    @classmethod
    def of(cls, key_bias: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None) -> KeyGroups:
        """The groups of a bias. Reads its values, for which the host waits: make them once for many calls.

        Args:
            key_bias: float32 (B, N_k) of dense keys, or (T_k,) of packed ones.
            cu_seqlens_k: (B + 1,) int32 of packed keys.

        Raises:
            TypeError: not float32, or not int32.
            ValueError: other dimensions, offsets that do not fit, a bias that is NaN or +inf, more than 8 biases.
        """
        packed, given = cu_seqlens_k is not None, cu_seqlens_k
        checks.expect_tensor("key_bias", key_bias, dtypes=(torch.float32,), dims=(1,) if packed else (2,))
        if cu_seqlens_k is not None:
            checks.expect_tensor("cu_seqlens_k", cu_seqlens_k, dtypes=(torch.int32,), dims=(1,), device=key_bias.device)
            checks.check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, key_bias.shape[0], read=True)
            shared = cu_seqlens_k.shape[0] == 2
        else:
            shared = _is_shared(key_bias)
            if shared:
                key_bias = key_bias[0] if key_bias.shape[0] else key_bias.new_empty(0)
            else:
                cu_seqlens_k = offsets(key_bias.shape[0], key_bias.shape[1], key_bias.device)
                key_bias = key_bias.reshape(-1)
        values = _distinct(key_bias)
        rows = tuple((key_bias == value).nonzero()[:, 0] for value in values)
        if shared or cu_seqlens_k is None:
            return cls(values, rows, (), (True,) * len(values), key_bias.shape[0], given)
        ends = tuple(torch.searchsorted(each, cu_seqlens_k.long()).int() for each in rows)
        complete = tuple(bool((end[1:] > end[:-1]).all()) for end in ends)
        return cls(values, rows, ends, complete, key_bias.shape[0], given)

    def to(self, device: torch.device | str | int, **how: Any) -> KeyGroups:
        """The same groups on another device."""
        rows, ends = (tuple(x.to(device, **how) for x in each) for each in (self.rows, self.ends))
        start = None if self.offsets is None else self.offsets.to(device, **how)
        return KeyGroups(self.values, rows, ends, self.complete, self.keys, start)

    def check_fits(self, k: torch.Tensor, cu_seqlens_k: torch.Tensor | None) -> None:
        """ValueError unless the groups are those of `k`, dense or packed. Lengths are compared where values are."""
        sequences = None if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1
        if any(rows.device != k.device for rows in self.rows):
            raise ValueError(f"key_groups: expected device {k.device}, got {self.rows[0].device}")
        if torch.compiler.is_compiling():  # the number of keys would become a constant of the graph
            return
        keys = k.shape[-3] if sequences is not None or not self.ends else k.shape[0] * k.shape[1]
        if self.keys != keys:
            raise ValueError(f"key_groups: expected groups of {keys} keys, got groups of {self.keys}")
        wanted = k.shape[0] if sequences is None else sequences
        got = self.ends[0].shape[0] - 1 if self.ends else None
        if (got is None and sequences not in (None, 1)) or got not in (None, wanted):
            raise ValueError(f"key_groups: expected groups of {wanted} sequences, got groups of {got or 1}")
        if self.offsets is None or cu_seqlens_k is None or not checks.values_are_checked(cu_seqlens_k):
            return
        if not torch.equal(self.offsets, cu_seqlens_k):
            lengths = ([*one.diff().tolist()] for one in (cu_seqlens_k, self.offsets))
            raise ValueError("key_groups: expected groups of sequences of {} keys, got of {}".format(*lengths))

    def __iter__(self) -> Iterator[tuple[float, torch.Tensor, torch.Tensor | None, bool]]:
        """value, rows, ends (None if shared) and complete of every group."""
        ends = self.ends or (None,) * len(self.values)
        yield from zip(self.values, self.rows, ends, self.complete)


def offsets(count: int, length: int, device: torch.device) -> torch.Tensor:
    """`cu_seqlens` (count + 1,) int32 of equally long sequences."""
    return torch.arange(0, (count + 1) * length, length or 1, dtype=torch.int32, device=device)[: count + 1]


def _is_shared(key_bias: torch.Tensor) -> bool:
    """Whether all samples have the same bias."""
    if key_bias.shape[0] <= 1 or key_bias.stride(0) == 0:
        return True
    return bool((key_bias == key_bias[:1]).all())


def _distinct(key_bias: torch.Tensor) -> tuple[float, ...]:
    """The biases, ascending, without -inf, which hides a key."""
    values = [value for value in key_bias.unique().tolist() if value != -torch.inf]
    if any(not value < torch.inf for value in values):  # also catches NaN
        raise NotMergeable('key_bias: expected finite values or -inf with backend="merged", got NaN or +inf')
    if len(values) > MOST:
        raise NotMergeable(
            f'key_bias: expected at most {MOST} distinct values with backend="merged", one pass each, got '
            f'{len(values)}; backend="triton" and "torch" take any'
        )
    return tuple(values)

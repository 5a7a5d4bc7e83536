"""Operators of a forward pass, with their operations and bytes, and those of blocks whose MLP has a gate."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # bf16


@dataclass(frozen=True)
class Op:
    """`count` equal operators; `flops` and `bytes` of each."""

    name: str
    flops: float
    bytes: float
    count: float = 1


def product(name: str, rows: float, inner: float, outer: float, count: float) -> Op:
    """A matrix product of `rows` with a weight."""
    elements = rows * (inner + outer) + inner * outer if rows else 0
    return Op(name, 2 * rows * inner * outer, BYTES * elements, count)


def pointwise(name: str, elements: float, count: float) -> Op:
    """What reads and writes so many elements, without operations that count."""
    return Op(name, 0, BYTES * elements, count)


class GatedBlocks:
    """FLUX.2's blocks of width `d`: an MLP with a gate, and one modulation for all blocks of a kind."""

    def __init__(self, d: float, ratio: float):
        self.d, self.inner = d, ratio * d

    def shared(self) -> list[Op]:
        """The modulation of both streams of the double blocks, and of the single ones."""
        return [pointwise("modulation", 15 * self.d**2, 1)]

    def stream(self, rows: float, asked: float, count: float) -> list[Op]:
        """One stream of double blocks; only `asked` of its rows go beyond their keys and values."""
        d, inner = self.d, self.inner
        return [
            pointwise("norm", 2 * rows * d, count),
            product("qkv", rows, d, 3 * d, count),
            pointwise("qk norm and rotary", 2 * (rows + asked) * d, count),
            product("projection", asked, d, d, count),
            pointwise("norm", 2 * asked * d, count),
            product("mlp up", asked, d, 2 * inner, count),
            pointwise("gate", 3 * asked * inner, count),
            product("mlp down", asked, inner, d, count),
            pointwise("gate and add", 3 * asked * d, 2 * count),
        ]

    def single(self, rows: float, asked: float, count: float) -> list[Op]:
        """Single blocks, as `stream`; their first product is one for attention and MLP, and runs for every row."""
        d, inner = self.d, self.inner
        if not count:
            return []
        return [
            pointwise("norm", 2 * rows * d, count),
            product("qkv and mlp up", rows, d, 3 * d + 2 * inner, count),
            pointwise("qk norm and rotary", 2 * (rows + asked) * d, count),
            pointwise("gate", 3 * asked * inner, count),
            pointwise("cat", 2 * asked * (d + inner), count),
            product("projection and mlp down", asked, d + inner, d, count),
            pointwise("gate and add", 3 * asked * d, count),
        ]


class GatedStream(GatedBlocks):
    """Qwen-Image-2.1's blocks: one stream, q apart from k and v, and one modulation for all."""

    def stream(self, rows: float, asked: float, count: float) -> list[Op]:
        ops = super().stream(rows, asked, count)
        if rows == asked:
            return ops
        d = self.d
        each = [product("q", asked, d, d, count), product("kv", rows, d, 2 * d, count)]
        return [*each, *(op for op in ops if op.name != "qkv")]

    def shared(self) -> list[Op]:
        return [pointwise("modulation", 4 * self.d**2, 1)]

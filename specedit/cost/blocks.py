"""How many operations the matrices of a transformer block take, for models whose blocks differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class BlockCount(NamedTuple):
    """Operations per token and block in units of d^2, attention to other tokens apart.

    whole: all of them. unread: those of a token of which the last block needs only keys and values. The defaults are
    FLUX.1's and Qwen's: four projections (8) and an MLP of ratio 4 (16), of which keys and values take 4.
    modulation: weights of the whole transformer that make nothing else, in units of d^2, where they are not those of
    FLUX.1's and Qwen's blocks.
    """

    whole: float = 24.0
    unread: float = 4.0
    modulation: float | None = None


def gated_blocks(config: Any) -> BlockCount:
    """FLUX.2: an MLP of ratio r with a gate has three matrices (6 r).

    A single block has one first matrix for q, k, v (6) and MLP (4 r). It runs for every token of the last block. All
    blocks of a kind share their modulation: 6 for each stream of the double ones, 3 for the single ones, 2 at the end.
    """
    ratio = field(config, "mlp_ratio", 3.0)
    return BlockCount(8 + 6 * ratio, 6 + 4 * ratio, modulation=17)


def gated_stream(config: Any) -> BlockCount:
    """Qwen-Image-2.1: an MLP with a gate as FLUX.2's, and four projections of their own. Modulation has no shift: 4 for
    all blocks, and 1 at the end."""
    return BlockCount(8 + 6 * field(config, "mlp_ratio", 3), modulation=5)


# By a field that only this family's transformer configuration has.
_COUNTS: dict[str, Callable[[Any], BlockCount]] = {
    "timestep_guidance_channels": gated_blocks, "causal_condition": gated_stream,
}  # fmt: skip


def register_block_count(name: str, count: Callable[[Any], BlockCount]) -> None:
    """Count the blocks of transformers whose configuration has a field `name` by `count(config)`.

    Reports and plans both follow it. Without one, blocks count as FLUX.1's.

    Raises:
        TypeError: `name` is not a string, or `count` cannot be called.
    """
    if not isinstance(name, str) or not callable(count):
        raise TypeError(f"block count: expected a field's name and a function of the config, got {name!r}, {count!r}")
    _COUNTS[name] = count


def block_count(config: Any) -> BlockCount:
    """The count of a transformer configuration, mapping or object."""
    for name, count in _COUNTS.items():
        if field(config, name) is not None:
            return count(config)
    return BlockCount()


def field(config: Any, name: str, default: Any = None) -> Any:
    """A field of a configuration, mapping or object."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)

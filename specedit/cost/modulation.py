"""What modulation="once" saves: weights that only make scale, shift and gate, and how often a run reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import block_count, field
from .operators import BYTES
from .tables import ModelCost


def modulation_width(config: Any) -> tuple[float, float]:
    """Vectors of the transformer's width d that one step makes, each from a matrix of d^2 weights; and d.

    FLUX.1's and Qwen's double blocks make 6 for each of two streams, single blocks 3, and the last norm 2.
    `BlockCount.modulation` has those of other blocks.
    """
    d = field(config, "num_attention_heads") * field(config, "attention_head_dim")
    own = block_count(config).modulation
    if own is None:
        own = 12 * field(config, "num_layers") + 3 * field(config, "num_single_layers", 0) + 2
    return own, d


def planned_modulation(cost: ModelCost, rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    """Of a plan's rows, in bf16: `weight_bytes`, how often they are read with "step" (`reads`) and with "once"
    (`reads_once`), `bytes_less` of weights that the latter reads, and `kept_bytes` that it keeps."""
    vectors, d = modulation_width(cost.config)
    prompts = cost.passes if cost.pooled else 1
    reads = sum(row["passes"] for row in rows)
    once = prompts * any(row["name"] != "mixed" for row in rows)
    once += prompts * sum(row["groups"] for row in rows if row["name"] == "mixed")
    if cost.fixed_reference:  # a stage's first step makes those of the references' timestep too, and is left alone
        once += sum(row["groups"] for row in rows)
    once = min(once, reads)
    times = sum(row["steps"] * row["groups"] for row in rows)
    weights = BYTES * vectors * d * d
    return {
        "weight_bytes": weights, "reads": reads, "reads_once": once, "bytes_less": (reads - once) * weights,
        "kept_bytes": BYTES * (vectors + 1) * d * times * (prompts * samples if cost.pooled else 1),
    }  # fmt: skip

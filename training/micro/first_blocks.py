"""Runs a transformer's first blocks alone, where nothing reads what the later ones compute."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def only_first(model: nn.Module, depth: int = 2) -> Iterator[None]:
    """Truncate the transformer to its first `depth` double-stream blocks inside the context."""
    names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(model, name)]
    whole = {name: getattr(model, name) for name in names}
    model.transformer_blocks = whole["transformer_blocks"][:depth]
    if "single_transformer_blocks" in whole:
        model.single_transformer_blocks = nn.ModuleList()
    try:
        yield
    finally:
        for name, blocks in whole.items():
            setattr(model, name, blocks)

"""The modules of a model, which every call looks at."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Every module of a model once, the outer before the inner.

    As `root.modules()`, whose generators are nested as deep as the model: each module passes through all of them.
    """
    found, seen = [root], {root}
    for module in found:  # grows while it is read
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found

"""Where a pipeline runs."""

from __future__ import annotations

from typing import Any

import torch


def execution_device(pipe: Any, default: torch.device | str = "cpu") -> torch.device:
    """The device that a pipeline runs on; `default` of one that does not say.

    diffusers looks at every module of every component for it, so it is only asked where it has a choice.
    """
    first = next(pipe.transformer.parameters(), None)
    if first is not None and first.device.type == "cpu" and not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(getattr(pipe, "_execution_device", default))

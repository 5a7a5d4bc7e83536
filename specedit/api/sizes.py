"""Sizes at which the output's grid is the picture's own, and the warning where it is not."""

from __future__ import annotations

from typing import Any

from ..models import adapter_of, adapters
from ..once import warn_once
from ..placement import Placement


def size_for(pipe: Any, picture: Any) -> dict[str, Any]:
    """The call's size arguments at which nothing of the picture is cropped or stretched.

    They give the output the grid that the model takes the picture at: the picture's frame at the model's usual area, or
    at the picture's own size for the embedded editors. `pipe(image=picture, **specedit.size_for(pipe, picture), ...)`.

    Args:
        pipe: a pipeline that `install` takes, installed or not.
        picture: PIL image, array (H, W, C) or (B, H, W, C), tensor (C, H, W) or (B, C, H, W), or a list of them. Of
            several, the last is the one that QwenImageEditPlusPipeline edits; the others take the first one's size.

    Returns:
        `height`, `width` and what else the pipeline's size depends on; empty for a pipeline without such arguments.

    Raises:
        TypeError: a pipeline that is not supported, or no picture.
        ValueError: an array or tensor of another shape, an empty list, or a picture smaller than a token.
    """
    adapter = adapter_of(pipe)
    if adapter is None:
        known = ", ".join(a.pipelines for a in adapters())
        raise TypeError(f"size_for: expected one of {known}, got {type(pipe).__name__}")
    return adapter.call_size(pipe, picture)


def warn_if_cropped(pipe: Any, placement: Placement, side: int) -> None:
    """A warning where the picture is cropped or padded, once for each pair of sizes. side: px of a token."""
    if placement.is_same:
        return
    output, taken = (f"{side * grid.width} x {side * grid.height}" for grid in (placement.output, placement.reference))
    rows, columns = placement.shown
    spans = [f"{name} {side * s.start} to {side * s.stop}" for name, s in (("columns", columns), ("rows", rows))]
    beyond = 1 - placement.covered.float().mean().item()
    message = (
        f"the output is {output} px and the model takes the picture at {taken} px: the output shows its "
        f"{' and '.join(spans)}"
        + (f", and {beyond:.0%} of the output lies beyond it and is edited" if beyond else "")
        + "; specedit.size_for(pipe, picture) gives sizes at which nothing is cropped"
    )
    warn_once(pipe, message)

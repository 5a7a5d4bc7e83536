"""Pictures of an edit next to its input and the edited cells."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from .run_report import RunReport

GAP = 8  # px of white between two pictures


def side_by_side(before: Image.Image, after: Image.Image, report: RunReport | None = None) -> Image.Image:
    """One RGB picture: before | after | edited cells, each of the size of `after`.

    Without a report, because the stock pipeline ran, the last panel is left out.
    """
    panels = [_sized(before.convert("RGB"), after.size), after.convert("RGB")]
    if report is not None:
        panels.append(where_it_looked(panels[1], report))
    width, height = after.size
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * (width + GAP), 0))
    return sheet


def where_it_looked(edit: Image.Image, report: RunReport) -> Image.Image:
    """The edit with coarse cells darkened and edited cells bright; all bright without masks."""
    light = torch.full((1, 1), 0.25)
    for share, mask in ((0.25, report.expand_mask), (0.5, report.edit_mask)):
        light = light + share * (1.0 if mask is None else mask[0].float())
    cells = Image.fromarray((light.numpy() * 255).astype(np.uint8)).resize(edit.size, Image.Resampling.NEAREST)
    return Image.fromarray((np.asarray(edit) * (np.asarray(cells)[..., None] / 255)).astype(np.uint8))


def _sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize; if the aspect ratios differ by more than a token's rounding, pad with white."""
    width, height = (round(a * min(size[0] / image.width, size[1] / image.height)) for a in image.size)
    if abs(width - size[0]) < 16 and abs(height - size[1]) < 16:
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="white")

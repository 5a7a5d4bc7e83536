"""The figure of a report: pictures, score and masks, and below them seconds and TFLOPs per stage."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from .registry import selectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .run_report import RunReport

# Accent and quiet colours; the masks use the two accents.
EDITED, EXPANDED, QUIET = "#d1495b", "#30638e", "#8d99ae"


def save(report: RunReport, path: str | PathLike[str], sample: int = 0) -> None:
    """`RunReport.save_figure`."""
    draw(report, sample).savefig(path, dpi=120)


def draw(report: RunReport, sample: int = 0, *, titled: bool = True) -> Figure:
    """The figure of one sample, with the report's title above it if `titled`.

    Raises:
        ValueError: no such sample.
    """
    # Figure itself, not pyplot: no global state, so calls from several threads do not meet.
    from matplotlib.figure import Figure

    grids = [g for g in (report.score, report.edit_mask, report.expand_mask) if g is not None]
    if any(not 0 <= sample < len(g) for g in grids):
        raise ValueError(f"sample: expected an index from 0 to {min(map(len, grids)) - 1}, got {sample}")
    panels = [
        panel
        for panel, present in (
            (_draw_source, report.source is not None),
            (_draw_edit, report.edit is not None),
            (_draw_score, report.score is not None),
            (_draw_masks, report.edit_mask is not None or report.expand_mask is not None),
        )
        if present
    ]
    figure = Figure(figsize=(max(8.0, 3.4 * len(panels)), 5.6 if panels else 2.4), layout="constrained")
    top: Any = figure
    bars: Any = figure
    if panels:
        subfigures: Any = figure.subfigures(2, 1, height_ratios=[3.4, 1.8])
        top, bars = subfigures
        for axes, panel in zip(top.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(report, axes, sample)
            axes.set_xticks([])
            axes.set_yticks([])
    left, right = bars.subplots(1, 2, sharey=True)
    _draw_bars(report, left, [s.seconds for s in report.stages], "seconds")
    _draw_bars(report, right, [s.flops / 1e12 for s in report.stages], "TFLOPs")
    left.invert_yaxis()
    if titled:  # a user's preset may be named with dollar signs, which are no formula
        top.suptitle(report.title(), fontsize=11, parse_math=False)
    return figure


def _draw_source(report: RunReport, axes: Any, sample: int) -> None:
    assert report.source is not None
    axes.imshow(report.source.convert("RGB"))
    axes.set_title("source", fontsize=10)


def _draw_edit(report: RunReport, axes: Any, sample: int) -> None:
    assert report.edit is not None
    axes.imshow(report.edit.convert("RGB"))
    axes.set_title("edit", fontsize=10)


def _backdrop(report: RunReport, axes: Any, rows: int, cols: int) -> tuple[float, float, float, float]:
    """Draw the source faintly and return the extent at which a grid of rows x cols covers it."""
    if report.source is None:
        extent = (0.0, float(cols), float(rows), 0.0)
    else:
        width, height = report.source.size
        extent = (0.0, float(width), float(height), 0.0)
        axes.imshow(report.source.convert("L"), cmap="gray", vmin=-255, vmax=255, extent=extent)
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    return extent


def _draw_score(report: RunReport, axes: Any, sample: int) -> None:
    assert report.score is not None
    grid = report.score[sample].numpy()
    extent = _backdrop(report, axes, *grid.shape)
    drawn = axes.imshow(grid, cmap="magma", vmin=0, alpha=0.75, extent=extent, interpolation="nearest")
    axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=8)
    axes.set_title(score_title(report), fontsize=10, parse_math=False)


def score_title(report: RunReport) -> str:
    """The title of the score's panel, with the threshold."""
    if report.config is None:
        return "score"
    if selectors[report.config.selector].verifies:
        return f"verification score (threshold {report.config.threshold:g})"
    return f"score of selector {report.config.selector!r}"  # which takes the largest, whatever their values


def _draw_masks(report: RunReport, axes: Any, sample: int) -> None:
    from matplotlib.colors import to_rgba

    edited, expanded = (None if m is None else m[sample] for m in (report.edit_mask, report.expand_mask))
    first = edited if edited is not None else expanded
    assert first is not None
    extent = _backdrop(report, axes, *first.shape)
    for mask, colour in ((expanded, EXPANDED), (edited, EDITED)):
        if mask is not None:
            overlay = torch.zeros(*mask.shape, 4)
            overlay[mask] = torch.tensor(to_rgba(colour, 0.7))
            axes.imshow(overlay.numpy(), extent=extent, interpolation="nearest")
    axes.set_title("masks", fontsize=10)
    for x, label, colour in ((0.0, "edited", EDITED), (0.3, "also expanded", EXPANDED)):
        axes.text(x, -0.03, f"■ {label}", color=colour, fontsize=9, va="top", transform=axes.transAxes)


def _draw_bars(report: RunReport, axes: Any, values: list[float], label: str) -> None:
    colours = [QUIET if stage.steps == 0 or stage.name == "draft" else EXPANDED for stage in report.stages]
    bars = axes.barh([stage.name for stage in report.stages], values, color=colours, height=0.65)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.margins(x=0.15)
    axes.tick_params(labelsize=9, left=False)
    axes.spines[["top", "right"]].set_visible(False)

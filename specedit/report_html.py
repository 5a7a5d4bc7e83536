"""A report in a notebook: its title, its figure and its table, as one piece of HTML that loads nothing."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from .report_figure import draw

if TYPE_CHECKING:
    from .run_report import RunReport

DPI = 80  # a page wide; save_figure draws finer
WORDS = 2  # columns of words, which align left


def render(report: RunReport) -> str:
    """The HTML of a report. Names that users gave, such as the preset's, are escaped."""
    title = html.escape(report.title())
    head, *stages, total = report.table()
    return (
        f'<div class="specedit-report"><p><strong>{title}</strong></p>'
        f'<img alt="{title}" style="max-width: 100%" src="data:image/png;base64,{_picture(report)}">'
        f"<table><thead>{_line(head, 'th')}</thead><tbody>{''.join(map(_line, stages))}</tbody>"
        f"<tfoot>{_line(total, 'th')}</tfoot></table></div>"
    )


def _picture(report: RunReport) -> str:
    """The figure's first sample as a PNG in base64."""
    drawn = io.BytesIO()
    draw(report, titled=False).savefig(drawn, format="png", dpi=DPI)
    return base64.b64encode(drawn.getvalue()).decode("ascii")


def _line(cells: tuple[str, ...], tag: str = "td") -> str:
    """A line of the table."""
    sides = ["left" if i < WORDS else "right" for i in range(len(cells))]
    made = (f'<{tag} style="text-align: {side}">{html.escape(c)}</{tag}>' for c, side in zip(cells, sides, strict=True))
    return f"<tr>{''.join(made)}</tr>"

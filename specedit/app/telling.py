"""What the page says of an edit: its cost beside stock's, and the pictures that show it."""

from __future__ import annotations

import html
import json
import secrets
from pathlib import Path

from PIL import Image

from ..batch.worker import line
from ..failures import out_of_memory, refused
from ..io import pictures
from ..io.files import write_text
from ..report_comparison import where_it_looked
from .desk import Turn

TERA = 1e12


def table(turn: Turn) -> str:
    """Time, model evaluations and FLOPs beside stock's, as Markdown."""
    done, seconds = turn.edit.report, turn.stock_seconds
    if done is None:
        return f"The stock pipeline ran, in {turn.seconds:.1f} s."
    steps = f"{done.nfe} + {done.draft_steps} draft" if done.draft_steps else f"{done.nfe}"
    gain = "" if seconds is None else f"{seconds / done.seconds:.1f}x"
    rows = [
        ("", "SpecEdit", f"stock, {done.stock_steps} steps", "stock / SpecEdit"),
        ("---", "---:", "---:", "---:"),
        ("seconds", f"{done.seconds:.2f}", "not run" if seconds is None else f"{seconds:.2f}", gain),
        ("TFLOPs", f"{done.flops / TERA:.3g}", f"{done.flops_stock / TERA:.3g}", f"{done.flops_ratio:.1f}x"),
        ("model evaluations", steps, f"{done.stock_steps}", ""),
        ("edited", f"{done.edit_fraction:.0%}", "100%", ""),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def stages(turn: Turn) -> str:
    """The report's own table, or what there is to say without one."""
    return str(turn.edit.report) if turn.edit.report is not None else "; ".join(turn.notes) or "no report"


def heading(turn: Turn) -> str:
    """One line above the result, as Markdown."""
    prompt = html.escape(turn.edit.prompt)
    notes = "".join(f" · {html.escape(note)}" for note in turn.notes)
    return f"**{turn.number}. {prompt}** · {turn.edit.picture.width} x {turn.edit.picture.height} px{notes}"


def overlay(turn: Turn) -> Image.Image | None:
    """The result, dark where nothing was edited; None of an edit that ran stock."""
    return None if turn.edit.report is None else where_it_looked(turn.edit.picture, turn.edit.report)


def files(turn: Turn, folder: Path) -> tuple[Path, Path]:
    """The result as PNG and its report as JSON, written once for each turn."""
    if turn.files is None:
        place = folder / secrets.token_hex(8)  # numbers begin anew with every picture
        picture, report = place / f"edit-{turn.number}.png", place / f"edit-{turn.number}.json"
        done = None if turn.edit.report is None else turn.edit.report.to_dict()
        content = {"prompt": turn.edit.prompt, "seed": turn.asked.seed, "model": turn.asked.model, "report": done}
        pictures.write(turn.edit.picture, picture)
        write_text(report, json.dumps(content, indent=1) + "\n")
        turn.files = (picture, report)
    return turn.files


def is_unexpected(error: BaseException) -> bool:
    """Whether the cause is neither the person's input nor the machine's memory, files or packages."""
    return not (refused(error) or out_of_memory(error) or isinstance(error, OSError | ImportError))


def failure(error: BaseException) -> str:
    """What people read of an error: one line, as HTML."""
    text = "out of memory; a smaller picture or model takes less" if out_of_memory(error) else line(error)
    return html.escape(f"unexpected {type(error).__name__}: {text}" if is_unexpected(error) else text)

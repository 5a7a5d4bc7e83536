"""Errors on the command line: one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .. import failures

USER, UNEXPECTED, STOPPED, PIPE = 2, 1, 130, 141
TRACEBACK = "SPECEDIT_TRACEBACK"


class CLIError(Exception):
    """An error that the user can fix: one line, exit code 2."""


def explain(error: BaseException, args: argparse.Namespace) -> tuple[str, int]:
    """The line to show for an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", STOPPED
    if failures.out_of_memory(error):
        options = [f"--{name}, " for name in ("offload", "size") if not getattr(args, name, True)]
        return f"out of memory; {''.join(options)}a smaller picture or model takes less", USER
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, USER
    if isinstance(error, CLIError | OSError | ImportError) or failures.refused(error):
        return _line(error), USER
    hint = f"{TRACEBACK}=1 in the environment shows where"
    return f"unexpected {type(error).__name__}: {_line(error)}; {hint}", UNEXPECTED


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print Python's warnings as one line on stderr, without the source location."""
    import warnings

    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"specedit: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def close_output() -> None:
    """Redirect stdout to the null device after a broken pipe, so that the interpreter's last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(error: BaseException) -> str:
    """The first line of the message, truncated."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 600 else f"{line[:597]}..."

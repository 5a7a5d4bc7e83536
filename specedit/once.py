"""Warnings that an installed pipeline gives once for each cause, however often it is called."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

from .hold import Hold

_lock = threading.Lock()


def warn_once(pipe: Any, text: str, cause: str | None = None, warn: Callable[[str], Any] | None = None) -> None:
    """Warn with `text` unless `pipe` has already warned of the same cause; a copy of a pipeline warns anew.

    Args:
        pipe: the pipeline that is called. Without an installation it warns every time.
        text: the message.
        cause: what is remembered, where the text itself differs from call to call; the text if None.
        warn: takes the message, such as a logger's `warning`; `warnings.warn` at the caller's line if None.
    """
    given: set[str] = getattr(getattr(pipe, "_specedit", None), "warned", set())
    with Hold(_lock):  # one pipeline may serve several threads
        known = (cause or text) in given
        given.add(cause or text)
    if not known:
        warn_caller(text) if warn is None else warn(text)


def warn_caller(text: str) -> None:
    """Warn with `text` at the line outside this package that led here, whatever the depth."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)

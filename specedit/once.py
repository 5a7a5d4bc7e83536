"""Warnings that an installed pipeline gives once for each cause, however often it is called."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

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
    with _lock:  # one pipeline may serve several threads
        known = (cause or text) in given
        given.add(cause or text)
    if not known:
        warnings.warn(text, stacklevel=3) if warn is None else warn(text)

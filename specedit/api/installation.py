"""State of an installed pipeline: its configuration, the last call of every thread, and the threads that run stock."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..config import SpecEditConfig
from ..method.adapter import Adapter
from ..run_report import RunReport
from .encodings import Encodings

ATTRIBUTE = "_specedit"


@dataclass
class CallRecord:
    """One call: its report, or why it ran the stock pipeline. Neither if it failed."""

    report: RunReport | None = None
    stock_reason: str | None = None


class Calls:
    """The last call of every thread, which ends with the thread, and the last call that ended in any thread."""

    def __init__(self) -> None:
        self._thread = threading.local()
        self._last: CallRecord | None = None

    @contextmanager
    def record(self) -> Iterator[CallRecord]:
        """The record of a call that begins here. Other threads see it once the call has ended."""
        self._thread.last = record = CallRecord()
        try:
            yield record
        finally:
            self._last = record

    @property
    def last(self) -> CallRecord | None:
        """The calling thread's last call, or the last of all where this thread has made none."""
        return getattr(self._thread, "last", None) or self._last


class Token:
    """Stands for a block that is open. In a WeakSet it ends with the frame that holds it, even where Ctrl-C keeps the
    frame from taking it out."""


class Blocks:
    """The open blocks of one kind, of each thread."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is in such a block."""
        return len(getattr(self._thread, "open", ())) > 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        blocks = vars(self._thread).setdefault("open", weakref.WeakSet())
        block = Token()
        try:
            blocks.add(block)
            yield
        finally:
            blocks.discard(block)


@dataclass
class Installation:
    """What hangs on an installed pipeline.

    disabled: blocks of `specedit.disabled`. session: calls of a `Session`, which reuse encodings whatever the
    configuration says; with `keep_pixels` they keep what an edit has not changed within its mask, too. next_call: what
    `specedit.api.served` holds for this thread's next call. serving: held by such calls, which run one after another.
    keeps_steps: calls take the configuration's steps, whatever their num_inference_steps.
    """

    config: SpecEditConfig
    adapter: Adapter
    stock_class: type
    calls: Calls = field(default_factory=Calls)
    disabled: Blocks = field(default_factory=Blocks)
    warned: set[str] = field(default_factory=set)
    transformers: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # those that were hooked for it
    encodings: Encodings = field(default_factory=Encodings)
    session: Blocks = field(default_factory=Blocks)
    next_call: threading.local = field(default_factory=threading.local)
    serving: Any = field(default_factory=threading.Lock)
    keeps_steps: bool = False

    def __reduce__(self) -> tuple[Any, ...]:  # of a copy, whose calls, transformers and encodings are its own
        return Installation, (self.config, self.adapter, self.stock_class)


def installation_of(pipe: Any) -> Installation | None:
    return getattr(pipe, "__dict__", {}).get(ATTRIBUTE)

"""The pipelines behind the page: loaded at their first use, and used by one edit at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import pipelines
from ..pipelines import EDITORS, Prepare, loading
from ..pipelines.machine import attention_here
from .watch import Cancelled, Tell

WAIT = 0.1  # seconds between two looks whether someone who waits has cancelled


@dataclass(frozen=True)
class Loaded:
    """A stock pipeline, the function that prepares pictures for it, and the settings that this machine needs."""

    pipe: Any
    prepare: Prepare
    here: dict[str, str]

    def own(self) -> Any:
        """A pipeline of one's own on the same weights: what is installed on it, and what it keeps, is nobody else's."""
        return copy.copy(self.pipe)


class Models:
    """Pipelines by name.

    Args:
        model: hub id or folder of a pipeline to offer besides the embedded editors, as the first choice.
        offload: keep only the running part on the GPU.

    Raises:
        ValueError: `model` is neither, or of a kind that cannot be accelerated. Hub ids are looked up when loaded.
    """

    def __init__(self, model: str | None = None, *, offload: bool = False):
        if model is not None and model not in EDITORS:
            loading.check_model(model, EDITORS)
            loading.check_supported(model)
        given = [model] if model is not None else []
        self.names: tuple[str, ...] = tuple(dict.fromkeys([*given, *EDITORS]))
        self.offload = offload
        self._loaded: dict[str, Loaded] = {}
        self._line = threading.Lock()

    def check(self, name: Any) -> str:
        """`name`, if it is offered. Raises ValueError."""
        if name not in self.names:
            raise ValueError(f"model: expected one of {', '.join(self.names)}, got {name!r}")
        return str(name)

    def is_embedded(self, name: str) -> bool:
        """Whether it is an embedded editor, or one trained like them, which understands their vocabulary only."""
        return name in EDITORS or loading.embedded_editor(name) is not None

    @contextmanager
    def turn(self, cancelled: threading.Event, tell: Tell) -> Iterator[None]:
        """Wait until no other edit runs, and hold the machine for a block. Raises Cancelled."""
        while not self._line.acquire(timeout=WAIT):
            if cancelled.is_set():
                raise Cancelled
            tell(0.0, "waiting for another edit")
        try:
            yield
        finally:
            self._line.release()

    def load(self, name: str, tell: Tell) -> Loaded:
        """A model, read at its first use. Call it inside a `turn`. Raises what `pipelines.load` raises."""
        if name not in self._loaded:
            tell(0.0, f"loading {name}")
            pipe, prepare = pipelines.load(name, offload=self.offload)
            self._loaded[name] = Loaded(pipe, prepare, attention_here())
        return self._loaded[name]

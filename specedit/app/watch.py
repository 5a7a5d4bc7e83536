"""Stands in for a pipeline's progress bar: names the stage, and ends a cancelled run at its next step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..config import SpecEditConfig

Tell = Callable[[float, str], None]  # (share done, what is being done)
STAGES = ("coarse", "mixed", "full")


class Cancelled(Exception):
    """The person has cancelled the edit."""


class Watch:
    """Follows one call of a pipeline.

    Args:
        tell: hears the share that is done, 0 to 1, and the stage.
        cancelled: set by another thread to end the run.
        config: of the call; None of a stock call.
    """

    def __init__(self, tell: Tell, cancelled: threading.Event, config: SpecEditConfig | None):
        self.tell, self.cancelled, self.config = tell, cancelled, config
        self.steps: list[str] = []
        self.done = 0

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Put the watch in the place of the pipeline's own bar for a block. The pipeline must be the caller's alone."""
        pipe.progress_bar = self.bar
        self.say(0.0, "encoding")
        try:
            yield
        except Cancelled:
            pipe.maybe_free_model_hooks()  # an offloaded model that was under way
            raise
        finally:
            del pipe.progress_bar

    @contextmanager
    def bar(self, iterable: Any = None, total: int | None = None) -> Iterator[Watch]:
        """As `DiffusionPipeline.progress_bar`."""
        self.steps, self.done = stage_names(self.config, total or 1), 0
        self.update(0)
        yield self

    def update(self, n: int = 1) -> None:
        """Note `n` steps more. Raises Cancelled."""
        self.done += n
        total = len(self.steps)
        if self.done >= total:
            self.say(1.0, "decoding")
            return
        stage = self.steps[self.done]
        number, of = self.done - self.steps.index(stage) + 1, self.steps.count(stage)
        self.say(self.done / total, f"{stage}, step {number} of {of}")

    def say(self, share: float, what: str) -> None:
        """Tell, unless the run was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled
        self.tell(share, what)


def stage_names(config: SpecEditConfig | None, total: int) -> list[str]:
    """The stage of each of a run's `total` steps. A draft is there where the run has more steps than the main run."""
    if config is None or config.method_options is not None:
        return ["stock" if config is None else "edit"] * total
    names = ["draft"] * (total - config.nfe)
    for stage, count in zip(STAGES, config.steps):
        names += [stage] * count
    return names

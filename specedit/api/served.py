"""A call whose settings somebody else chose for it alone: a server, for a request.

Servers call a pipeline with arguments that they have filtered by its signature, so settings cannot travel among them.
They wait on the installation for the next call of the same thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ..config import SpecEditConfig
from ..hold import Hold
from .installation import CallRecord, Installation


@dataclass(frozen=True)
class Served:
    """Settings of one call.

    config: its configuration. keeps_steps: whether `num_inference_steps` leaves the configuration's steps as they are.
    around: a context that the call runs in; the record is filled at the end of the block.
    """

    config: SpecEditConfig
    keeps_steps: bool
    around: Callable[[CallRecord], AbstractContextManager[None]]


def put(installation: Installation, served: Served) -> None:
    """Settings for this thread's next call. Those of a call that never came are forgotten."""
    installation.next_call.served = served


@contextmanager
def taken(installation: Installation, record: CallRecord) -> Iterator[Installation]:
    """The installation as the call that begins here sees it."""
    served: Served | None = vars(installation.next_call).pop("served", None)
    if served is None:
        yield installation
        return
    with Hold(installation.serving), served.around(record):
        yield dataclasses.replace(installation, config=served.config, keeps_steps=served.keeps_steps)

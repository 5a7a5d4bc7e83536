"""A lock that an interrupt does not leave locked."""

from __future__ import annotations

from typing import Any


class Hold:
    """Holds a lock inside a `with` block.

    Ctrl-C between a block's last line and its exit skips the exit. Then the lock is released with the block's frame,
    which holds the last reference to this object.
    """

    _held = False  # of the class, so that one whose making is interrupted can be deleted

    def __init__(self, lock: Any):
        self._lock: Any = lock

    def __enter__(self) -> Hold:
        self._held = self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        # One line: an interrupt between its parts would leave the lock locked, or release it twice.
        self._held = bool(self._held and self._lock.release())  # release returns None

    __del__ = __exit__

"""Who works at which desk: one desk for each open page."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

from .desk import Desk
from .models import Models

MOST = 32  # desks; beyond that the one unused for longest is cleared


class People:
    """Desks by the page's own secret, which Gradio makes for every page that is opened.

    No desk is reachable from another page. A page that is closed takes its pictures and files with it.

    Args:
        models: what they edit with.
        root: folder for the files that they download.
    """

    def __init__(self, models: Models, root: Path):
        self.models, self.root = models, root
        self._desks: OrderedDict[str, Desk] = OrderedDict()
        self._lock = threading.Lock()

    def desk(self, page: str | None) -> Desk:
        """The desk of a page. Raises ValueError for a call without a page."""
        if not page:
            raise ValueError("page: expected a call from an open page, got one without its session")
        with self._lock:
            desk = self._desks.setdefault(page, Desk(self.models))
            self._desks.move_to_end(page)
            oldest = list(self._desks)[: max(len(self._desks) - MOST, 0)]
        for old in oldest:
            self.leave(old)
        return desk

    def folder(self, page: str | None) -> Path:
        """The folder of a page's files; its name does not give the secret away."""
        return self.root / hashlib.sha256((page or "").encode()).hexdigest()[:32]

    def close(self) -> None:
        """Stop and forget what all pages do."""
        with self._lock:
            pages = list(self._desks)
        for page in pages:
            self.leave(page)

    def leave(self, page: str | None) -> None:
        """Stop what a page does, and forget it."""
        with self._lock:
            desk = self._desks.pop(page or "", None)
        if desk is not None:
            desk.close()
            shutil.rmtree(self.folder(page), ignore_errors=True)

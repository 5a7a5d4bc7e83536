"""One person's work: a picture, its edits in a session, and what may be done next."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..api.installation import installation_of
from ..api.installing import disabled, install, report, uninstall
from ..api.session import Edit, Session
from ..config import SpecEditConfig, resolve
from ..pipelines import arguments
from .models import Loaded, Models
from .settings import Asked
from .watch import Tell, Watch

MOST = 50  # edits of a history; older ones are dropped


@dataclass
class Turn:
    """One edit.

    edit: what the session made. before: the picture that was edited. mask: what was painted, or None. seconds: of the
    call. notes: sentences for the person. stock, stock_seconds: the stock pipeline's result of the same call, once it
    was asked for. files: picture and report, once they were written for a download.
    """

    number: int
    asked: Asked
    edit: Edit
    before: Image.Image
    mask: Image.Image | None
    seconds: float
    notes: tuple[str, ...] = ()
    stock: Image.Image | None = None
    stock_seconds: float | None = None
    files: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Call:
    """Arguments of one call: the prompt in the model's words, the mask, the seed, and guidance."""

    prompt: str
    mask: Image.Image | None
    seed: int
    guidance: dict[str, Any]


class Desk:
    """Edits one picture after another. Calls of two threads do not overlap: the second one is refused.

    Attributes:
        base: the picture that the next edit works on, or None.
        turns: every edit of the picture, undone ones too, the first one first.
    """

    def __init__(self, models: Models):
        self.models = models
        self.base: Image.Image | None = None
        self.turns: list[Turn] = []
        self._session: Session | None = None
        self._model: tuple[str, Loaded] | None = None  # of the session
        self._first: Image.Image | None = None  # what the session began with
        self._accepted = 0  # edits of the session that `base` has
        self._made = 0
        self._busy = threading.Lock()
        self._cancelled = threading.Event()

    @property
    def turn(self) -> Turn | None:
        """The last edit in effect."""
        edits = self._session.edits if self._session else ()
        return next((turn for turn in self.turns if edits and turn.edit is edits[-1]), None)

    def open(self, picture: Image.Image) -> None:
        """Begin with another picture; mode RGB."""
        with self._working("open"):
            self._leave()
            self.base, self.turns, self._made = picture, [], 0

    def edit(self, asked: Asked, mask: Image.Image | None, tell: Tell) -> Turn:
        """Edit `base`. The result becomes `turn`; `base` stays until `go_on`.

        Args:
            asked: the settings, checked here.
            mask: of any size, nonzero = edit; None leaves it to the draft.
            tell: hears of the progress.

        Raises:
            TypeError, ValueError: no picture, or a setting that cannot be; the desk stays as it was.
            Cancelled: `cancel` was called; the desk stays as it was.
        """
        if self.base is None:
            raise ValueError("picture: expected one to edit, got none; drop one or take an example")
        settings, name = asked.checked(), self.models.check(asked.model)
        prompt, notes = asked.sentence(self.models.is_embedded(name))
        with self._working("edit"), self.models.turn(self._cancelled, tell):
            loaded = self.models.load(name, tell)
            guidance = arguments.guidance(loaded.pipe, settings.guidance)
            overrides: dict[str, Any] = {**loaded.here}
            config = resolve(settings.config, **overrides)
            session, new = self._session_for(name, loaded, config)
            try:
                call = Call(prompt, mask, settings.seed, guidance)
                before, seconds = self._edit(session, loaded, call, config, tell)
            except BaseException:
                if new:
                    uninstall(session.pipe)
                raise
            if new:
                self._leave()
                self._session, self._model, self._first = session, (name, loaded), self.base
            self._made += 1
            edit = session.edits[-1]
            if edit.report is None:
                notes = (*notes, _why_stock(session.pipe))
            turn = Turn(self._made, asked, edit, before, mask, seconds, notes)
            self.turns = [*self.turns[-MOST + 1 :], turn]
            return turn

    def compare(self, tell: Tell) -> Turn:
        """Run the stock pipeline on what `turn` edited, with the same prompt and seed. It reads no mask.

        Raises:
            ValueError: there is no edit.
            Cancelled: `cancel` was called.
        """
        turn = self.turn
        if turn is None or self._session is None or self._model is None:
            raise ValueError("compare: expected an edit to compare with, got none")
        pipe, loaded = self._session.pipe, self._model[1]
        settings = turn.asked.checked()
        with self._working("compare"), self.models.turn(self._cancelled, tell):
            given = loaded.prepare(turn.before)[1] | arguments.guidance(loaded.pipe, settings.guidance)
            generator = torch.Generator().manual_seed(settings.seed)
            with Watch(tell, self._cancelled, None).watching(pipe), disabled(pipe):
                began = time.perf_counter()
                output = pipe(image=turn.before, prompt=turn.edit.prompt, generator=generator, **given)
            turn.stock, turn.stock_seconds = output.images[0], time.perf_counter() - began
        return turn

    def go_on(self) -> None:
        """Let the next edit work on the last result. Raises ValueError if there is none."""
        with self._working("edit this result"):
            if self._session is None or not self._session.edits:
                raise ValueError("edit this result: expected an edit, got none yet")
            self._accepted, self.base = len(self._session.edits), self._session.picture

    def undo(self) -> None:
        """Take back the last edit. Raises ValueError if there is none."""
        with self._working("undo"):
            if self._session is None:
                raise ValueError("undo: expected at least one edit, got none to take back")
            self._session.undo()
            if len(self._session.edits) < self._accepted:
                self._accepted, self.base = len(self._session.edits), self._picture(self._session)

    def redo(self) -> None:
        """Make the edit again that `undo` has taken back. Raises ValueError if there is none."""
        with self._working("redo"):
            if self._session is None:
                raise ValueError("redo: expected an edit that was undone, got none")
            before, accepted = self._picture(self._session), len(self._session.edits)
            self._session.redo()
            self.base, self._accepted = before, accepted

    def cancel(self) -> bool:
        """Stop what is under way at its next step; whether something was. From any thread."""
        busy = self._busy.locked()
        if busy:
            self._cancelled.set()
        return busy

    def close(self) -> None:
        """Stop, and forget everything."""
        self._cancelled.set()
        with self._busy:
            self._leave()
            self.base, self.turns = None, []

    def _edit(
        self, session: Session, loaded: Loaded, call: Call, config: SpecEditConfig, tell: Tell
    ) -> tuple[Image.Image, float]:
        """Edit what was accepted; the picture before, and seconds. On an error the session is what it was."""
        undone = len(session.edits) > self._accepted and session is self._session
        if undone:
            session.undo()
        before = session.picture
        try:
            given = loaded.prepare(before)[1] | call.guidance
            generator = torch.Generator().manual_seed(call.seed)
            with Watch(tell, self._cancelled, config).watching(session.pipe):
                began = time.perf_counter()
                session.edit(call.prompt, edit_mask=call.mask, generator=generator, **given)
        except BaseException:
            if undone:
                session.redo()
            raise
        return before, time.perf_counter() - began

    def _picture(self, session: Session) -> Image.Image | None:
        """The picture of a session; before its first edit the one that was opened, not yet at the model's size."""
        return session.picture if session.edits else self._first

    def _session_for(self, name: str, loaded: Loaded, config: SpecEditConfig) -> tuple[Session, bool]:
        """The session with this configuration, and whether it is a new one, of another model or picture."""
        session = self._session
        if session is None or self._model is None or self._model[0] != name:
            assert self.base is not None
            return Session(loaded.own(), loaded.prepare(self.base)[0], config), True
        installed = installation_of(session.pipe)
        if installed is None or installed.config != config:  # installing anew drops the encodings that are kept
            install(session.pipe, config)
        return session, False

    def _leave(self) -> None:
        """End the session."""
        if self._session is not None:
            uninstall(self._session.pipe)
        self._session, self._model, self._accepted = None, None, 0

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ValueError(f"{what}: expected nothing under way, got an edit that is; wait, or cancel it")
        try:
            self._cancelled.clear()
            yield
        finally:
            self._busy.release()


def _why_stock(pipe: Any) -> str:
    """The reason why the last call of this thread ran stock."""
    try:
        return report(pipe).title()
    except ValueError as error:
        return str(error).removeprefix("report: ")

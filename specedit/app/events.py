"""What happens on the page: from clicks to a desk, and from the desk back to the page."""

from __future__ import annotations

import functools
import html
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..io import pictures
from . import telling, uploads
from .desk import Desk, Turn
from .examples import Example
from .page import Parts
from .people import People
from .settings import Asked
from .watch import Cancelled, Tell

Updates = dict[Any, Any]


def guarded(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """A handler whose errors are messages on the page. What nobody expected is also in the terminal, with its trace."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Updates:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Cancelled:
            gr.Info("Cancelled; nothing was changed.")
            return {}
        except Exception as error:
            if telling.is_unexpected(error):
                traceback.print_exc()
            message = telling.failure(error)
        raise gr.Error(message, print_exception=False)  # outside the block: the message has no cause to show

    return run


class Events:
    """Handlers of one page's parts.

    Every handler reads the caller's own desk, by the request, and returns the parts that change.
    """

    def __init__(self, parts: Parts, people: People, examples: list[Example], limits: uploads.Limits):
        self.parts, self.people, self.examples, self.limits = parts, people, examples, limits

    def desk(self, request: gr.Request) -> Desk:
        return self.people.desk(request.session_hash)

    def opened(self, request: gr.Request, file: str | None) -> Updates:
        """A picture was uploaded, or its file taken away, which leaves everything as it is."""
        if file is None:
            return {}
        try:
            picture = uploads.read(file, self.limits)
        except Exception as error:
            gr.Warning(telling.failure(error), title="This is no picture for an edit")
            return {self.parts.file: None}
        for note in picture.notes:
            gr.Info(html.escape(note))
        return self.began(request, picture.image)

    def took_example(self, request: gr.Request, index: int) -> Updates:
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise ValueError(f"example: expected a number from 0 to {len(self.examples) - 1}, got {index!r}")
        example = self.examples[index]
        began = self.began(request, pictures.read(example.file).image)
        return {**began, self.parts.prompt: example.prompt, self.parts.file: None}

    def began(self, request: gr.Request, picture: Any) -> Updates:
        desk = self.desk(request)
        desk.open(picture)
        return {**self.shown(request), self.parts.painter: uploads.to_paint_on(picture)}

    def edit(self, request: gr.Request, tell: Tell, drawing: Any, *asked: Any) -> Updates:
        desk = self.desk(request)
        mask = uploads.painted(drawing, desk.base.size) if desk.base is not None else None
        turn = desk.edit(Asked(*asked), mask, tell)
        for note in turn.notes:
            gr.Info(html.escape(note))
        return self.shown(request)

    def compare(self, request: gr.Request, tell: Tell) -> Updates:
        desk = self.desk(request)
        desk.compare(tell)
        return self.shown(request)

    def move(self, request: gr.Request, how: str) -> Updates:
        """Undo, redo, or go on with the result: the next edit's picture may be another one, without paint."""
        desk = self.desk(request)
        before = desk.base
        getattr(desk, how)()
        painter = {} if desk.base is before else {self.parts.painter: uploads.to_paint_on(desk.base)}
        return {**self.shown(request), **painter}

    def cleared(self, request: gr.Request) -> Updates:
        """The painter's bin takes the picture away too: put it back, without paint."""
        return {self.parts.painter: uploads.to_paint_on(self.desk(request).base)}

    def cancel(self, request: gr.Request) -> Updates:
        if not self.desk(request).cancel():
            gr.Info("Nothing is under way.")
        return {}

    def chose_model(self, model: Any) -> Updates:
        embedded = self.people.models.is_embedded(self.people.models.check(model))
        return {self.parts.vocabulary: gr.Accordion(visible=embedded)}

    def left(self, request: gr.Request) -> None:
        self.people.leave(request.session_hash)

    def shown(self, request: gr.Request) -> Updates:
        """Everything on the right, from the desk."""
        parts, desk = self.parts, self.desk(request)
        turn = desk.turn
        folder = self.people.folder(request.session_hash)
        pairs = self._pictures(turn)
        picture, report = (None, None) if turn is None else telling.files(turn, folder)
        history = [(str(telling.files(one, folder)[0]), f"{one.number}. {one.edit.prompt}") for one in desk.turns]
        return {
            **pairs,
            parts.heading: "No edit yet." if turn is None else telling.heading(turn),
            parts.cost: "" if turn is None else telling.table(turn),
            parts.stages: "" if turn is None else telling.stages(turn),
            parts.picture_file: _download(picture),
            parts.report_file: _download(report),
            parts.history: history,
        }

    def _pictures(self, turn: Turn | None) -> Updates:
        parts = self.parts
        if turn is None:
            return {parts.slider: None, parts.overlay: None, parts.stock: None}
        stock = None if turn.stock is None else (turn.stock, turn.edit.picture)
        return {
            parts.slider: (turn.before, turn.edit.picture), parts.overlay: telling.overlay(turn), parts.stock: stock,
        }  # fmt: skip


def _download(file: Path | None) -> Any:
    return gr.DownloadButton(value=None if file is None else str(file), interactive=file is not None)


def connect(blocks: Any, parts: Parts, events: Events) -> None:
    """Bind the handlers. Edits wait in the models' own line, so that who waits can cancel too."""
    right = [
        parts.heading, parts.slider, parts.overlay, parts.stock, parts.cost, parts.stages, parts.picture_file,
        parts.report_file, parts.history,
    ]  # fmt: skip
    settings = [
        parts.prompt, parts.model, parts.preset, parts.restore, parts.seed, parts.negative_prompt,
        parts.true_cfg_scale,
    ]  # fmt: skip

    def bind(listen: Any, handler: Any, inputs: Any, outputs: Any, **more: Any) -> None:
        shown = {"show_progress": "hidden"} if "show_progress_on" not in more else {}
        listen(guarded(handler), inputs, outputs, api_visibility="private", concurrency_limit=None, **shown, **more)

    # Gradio finds requests by their annotation and progress by its default, among the arguments with names.
    def edit(request: gr.Request, progress: Any = gr.Progress(), *asked: Any) -> Updates:  # noqa: B008
        return events.edit(request, progress, *asked)

    def compare(request: gr.Request, progress: Any = gr.Progress()) -> Updates:  # noqa: B008
        return events.compare(request, progress)

    bind(parts.file.upload, events.opened, parts.file, [*right, parts.painter, parts.file])
    bind(parts.examples.click, events.took_example, parts.examples, [*right, parts.painter, parts.prompt, parts.file])
    for listen in (parts.edit.click, parts.prompt.submit):
        bind(listen, edit, [parts.painter, *settings], right, show_progress_on=parts.slider)
    bind(parts.compare.click, compare, None, right, show_progress_on=parts.stock)
    for button, how in ((parts.go_on, "go_on"), (parts.undo, "undo"), (parts.redo, "redo")):
        bind(button.click, _moving(events, how), None, [*right, parts.painter])
    bind(parts.painter.clear, events.cleared, None, parts.painter)
    bind(parts.cancel.click, events.cancel, None, parts.heading)
    bind(parts.model.change, events.chose_model, parts.model, parts.vocabulary)
    blocks.unload(events.left)


def _moving(events: Events, how: str) -> Callable[..., Updates]:
    def move(request: gr.Request) -> Updates:
        return events.move(request, how)

    return move

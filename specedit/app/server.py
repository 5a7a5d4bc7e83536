"""Starts and ends the page's server, on this machine alone."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from . import events, examples, page
from .models import Models
from .people import People
from .uploads import Limits

LOOPBACK = "127.0.0.1"
HOUR = 3600
# What Gradio reads from the environment: where uploads go, and that nothing is sent anywhere.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False"}


@contextmanager
def serving(
    model: str | None = None,
    *,
    offload: bool = False,
    port: int | None = None,
    limits: Limits | None = None,
    example_size: int = examples.SIZE,
) -> Iterator[str]:
    """Serve the page for the time of a block; yields its address.

    It listens on 127.0.0.1, and nothing is shared, counted or loaded from elsewhere. Uploads and results lie in a
    folder that is removed at the end.

    Args:
        model, offload: as for `models.Models`.
        port: None takes a free one, from 7860 on.
        limits: of uploads.
        example_size: px a side of the examples.

    Raises:
        ValueError: a model that is none, or a port that is taken.
    """
    check_port(port)
    limits = limits or Limits()
    models = Models(model, offload=offload)
    with tempfile.TemporaryDirectory(prefix="specedit-app-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        with _environment({**QUIET, "GRADIO_TEMP_DIR": str(root / "cache")}):
            people = People(models, root / "results")
            blocks = build(people, examples.write(root / "examples", example_size), limits)
            try:
                _, address, _ = launch(blocks, port, limits)
                yield address
            finally:
                people.close()  # an edit under way would hold up the end
                blocks.close(verbose=False)


def check_port(port: int | None) -> None:
    """Raises ValueError if nothing can listen there."""
    if port is None:
        return
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((LOOPBACK, port))
        except OSError as error:
            raise ValueError(f"port: expected a free one, got {port}: {error.strerror}") from error


def build(people: People, written: list[examples.Example], limits: Limits) -> Any:
    """The page as gr.Blocks."""
    with gr.Blocks(title=page.TITLE, analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as blocks:
        parts = page.lay_out(people.models, written)
        events.connect(blocks, parts, events.Events(parts, people, written, limits))
    return blocks


def launch(blocks: Any, port: int | None, limits: Limits) -> Any:
    """Start the server in the background."""
    blocks.queue(default_concurrency_limit=None)
    return blocks.launch(
        server_name=LOOPBACK, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
        show_error=False, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
        mcp_server=False, strict_cors=True, max_file_size=limits.bytes, theme=page.theme(), css=page.CSS,
    )  # fmt: skip


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

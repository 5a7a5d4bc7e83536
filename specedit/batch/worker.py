"""One installed pipeline that edits one row after the other."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from .. import pipelines
from ..config import SpecEditConfig
from ..pipelines import arguments
from ..pipelines.machine import attention_here, silence_libraries
from .jobs import Job
from .results import FAILED, Result

BROKEN = ("CUDA error", "HIP error")  # after these every further call of the process fails


class BrokenDevice(RuntimeError):
    """The process has lost its accelerator, so no further row can run in it."""


class Worker:
    """Loads a pipeline once and edits rows with it.

    Args:
        model, offload: as for `specedit edit`.
        out: folder for the pictures; None writes none.

    Raises:
        ValueError, FileNotFoundError: a model that cannot be loaded.
    """

    def __init__(self, model: str | None = None, out: Path | None = None, *, offload: bool = False):
        silence_libraries()
        self.out = out
        self.pipe, self.prepare = pipelines.load(model, offload=offload)
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(disable=True)
        self.here: dict[str, Any] = attention_here()
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.installed: SpecEditConfig | None = None

    def edit(self, job: Job) -> tuple[Result, Any]:
        """Edit a row and write its picture; returns the result and the PIL picture, None after an error.

        Raises:
            BrokenDevice: the process cannot go on. Every other error is the row's.
        """
        start = time.perf_counter()
        more: dict[str, Any] = {}
        edited = None
        try:
            edited, more = self._edit(job)
        except Exception as error:
            if any(text in str(error) for text in BROKEN):
                raise BrokenDevice(str(error)) from error
            more = {"status": FAILED, "error": line(error)}
        seconds = time.perf_counter() - start
        return Result(job.id, job.row, seconds=seconds, seed=job.settings.seed, worker=self.name, **more), edited

    def _edit(self, job: Job) -> tuple[Any, dict[str, Any]]:
        """The edited picture, and what the result says of it."""
        import torch

        from ..api.installing import last_report
        from ..io import pictures

        settings, path = job.settings, None if self.out is None else self.out / job.out
        if path is not None:
            pictures.check_target(path)
        picture, mask, notes = _opened(job)
        image, given = arguments.sized(picture.image, self.pipe, self.prepare, settings.size)
        given |= arguments.guidance(self.pipe, settings.guidance)
        given |= {} if settings.steps is None else {"num_inference_steps": settings.steps}
        self._install(settings.config)
        generator = torch.Generator().manual_seed(settings.seed)
        edited = self.pipe(image=image, prompt=job.prompt, edit_mask=mask, generator=generator, **given).images[0]
        more: dict[str, Any] = {}
        if path is not None:
            notes += pictures.write(edited, path, alpha=picture.alpha)
            more["output"] = str(path)
        if (report := last_report(self.pipe)) is not None:
            more |= {"flops_ratio": report.flops_ratio, "edit_fraction": report.edit_fraction, "nfe": report.nfe}
        return edited, more | {"notes": "; ".join((*job.notes, *notes)) or None}

    def _install(self, config: SpecEditConfig) -> None:
        from ..api.installing import install

        if config != self.installed:
            self.installed = None
            install(self.pipe, config, **self.here)
            self.installed = config


def _opened(job: Job) -> tuple[Any, Any, tuple[str, ...]]:
    """The picture, the mask for the call, and notes."""
    from ..io import pictures

    def named(what: str, value: Any) -> str | None:
        return None if isinstance(value, str) else f"{what} of {job.id}"

    picture = pictures.read(_file("image", job.image), named("image", job.image))
    if job.mask is None:
        return picture, None, picture.notes
    mask, notes = pictures.read_mask(_file("mask", job.mask), named("mask", job.mask))
    return picture, mask, picture.notes + notes


def _file(name: str, value: Any) -> Any:
    """What `specedit.io.pictures` reads: a path, or an open file of bytes or of an array's picture."""
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, str):
        return value
    from PIL import Image

    file = io.BytesIO()
    try:
        Image.fromarray(value).save(file, format="PNG")
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"{name}: expected an array (H, W, 3) of bytes, got {value.dtype} {value.shape}") from error
    file.seek(0)
    return file


def line(error: BaseException) -> str:
    """The error's message in one line, truncated."""
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= 600 else f"{text[:597]}..."

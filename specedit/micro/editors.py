"""The embedded editors, with what loading and evaluation need of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..versions import suppress_torchvision_warning

with suppress_torchvision_warning():
    from diffusers import FluxKontextPipeline, QwenImageEditPipeline

    from . import kontext, qwen


@dataclass(frozen=True)
class Editor:
    """One kind of embedded editor.

    Attributes:
        name: for `micro.load`; also the folder of its weights.
        pipeline: class of its pipeline, or a base class.
        load: reads the pipeline from a folder; keyword arguments go to `from_pretrained`.
        arguments: from an image to keyword arguments of the pipeline's call.
        passes: from (pipe, case, call) to the sequence length of each transformer call in a step.
        default_steps: the stock pipeline's default number of steps.
    """

    name: str
    pipeline: type
    load: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    passes: Callable[..., list[int]]
    default_steps: int


KONTEXT = Editor("kontext", FluxKontextPipeline, kontext.read, kontext.arguments, kontext.passes, default_steps=28)
QWEN = Editor("qwen", QwenImageEditPipeline, qwen.read, qwen.arguments, qwen.passes, default_steps=50)
EDITORS = (KONTEXT, QWEN)


def editor_named(name: str) -> Editor:
    """The editor "kontext" or "qwen".

    Raises:
        ValueError: another name.
    """
    for editor in EDITORS:
        if editor.name == name:
            return editor
    raise ValueError(f'name: expected "kontext" or "qwen", got {name!r}')


def editor_of(pipe: Any) -> Editor:
    """The editor that a pipeline belongs to.

    Raises:
        TypeError: neither.
    """
    for editor in EDITORS:
        if isinstance(pipe, editor.pipeline):
            return editor
    known = " or ".join(editor.pipeline.__name__ for editor in EDITORS)
    raise TypeError(f"pipe: expected a {known}, got {type(pipe).__name__}")

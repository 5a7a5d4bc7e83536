"""The table of trainable editors."""

from typing import Any

from specedit.micro.editors import editor_named, editor_of

from .family import Family
from .family_kontext import KONTEXT
from .family_qwen import QWEN

FAMILIES = {family.editor.name: family for family in (KONTEXT, QWEN)}


def family_named(name: str) -> Family:
    """The family "kontext" or "qwen".

    Raises:
        ValueError: another name.
    """
    return FAMILIES[editor_named(name).name]


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        TypeError: it is of neither.
    """
    return FAMILIES[editor_of(pipe).name]

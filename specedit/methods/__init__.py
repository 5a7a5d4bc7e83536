"""Other ways to sample an edit, one file each: what SpecEdit is compared with, and what others register.

The options of every registered method are found here by their class's name: `specedit.methods.Steps`.
"""

from typing import Any as _Any

from ..method_options import Method, register_method
from ..registry import methods as _methods

__all__ = ["Method", "register_method"]


def __getattr__(name: str) -> _Any:
    if name[:1].isupper():  # not a submodule that is being imported
        for options in _methods.values():
            if options.__name__ == name:
                return options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

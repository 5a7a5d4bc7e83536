"""What kind of failure an error is, for those who show it to people as one line."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

_OURS = tuple(f"{Path(__file__).parents[1] / name}{os.sep}" for name in ("specedit", "specedit_kernels"))
_MEMORY = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def refused(error: BaseException) -> bool:
    """Whether this package rejected a value; other libraries' errors are unexpected."""
    return isinstance(error, ValueError | TypeError) and _raised_in(error.__traceback__).startswith(_OURS)


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY)


def _raised_in(trace: TracebackType | None) -> str:
    file = ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return file

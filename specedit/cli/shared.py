"""What several commands need: the error of one line, checks before any work, options with one meaning."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from ..pipelines import EDITORS


class Failure(Exception):
    """An error that the user can do something about: one line, exit code 2."""


def check_size(size: int, low: int, high: int | None = None) -> None:
    if size < low or size % 16 or (high is not None and size > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise Failure(f"--size: expected a multiple of 16 {limits}, got {size}")


def seed_number(text: str) -> int:
    """What torch's generators take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def check_output(path: Path, kinds: Collection[str]) -> None:
    """Before any work: whether a picture can be written to `path`. `kinds`: suffixes with their dot."""
    if path.suffix.lower() not in kinds:
        raise Failure(f"expected a picture file such as {path.stem}.png, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def add_model(parser) -> None:
    parser.add_argument("--model", default=EDITORS[0], choices=EDITORS, help="which embedded editor")


def add_offload(parser) -> None:
    parser.add_argument(
        "--offload", action="store_true", help="only the part that runs is on the GPU, for models that it does not hold"
    )


def attention_here() -> dict[str, str]:
    """The settings with which an edit runs on this machine: none, or on a GPU without kernels attention="torch"."""
    import torch

    from specedit_kernels.ops import check_gpu

    if torch.cuda.is_available():
        try:
            check_gpu(torch.device("cuda"))
        except (ImportError, RuntimeError) as error:
            print(f"specedit: no Triton kernels here, PyTorch instead: {error}", file=sys.stderr)
            return {"attention": "torch"}
    return {}


def quiet() -> None:
    """Libraries' start-up chatter is not the user's concern; errors still are."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)

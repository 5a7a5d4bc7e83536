"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from ..pipelines import EDITORS, arguments
from ..pipelines.machine import attention_here as attention_here
from ..pipelines.machine import silence_libraries as silence_libraries
from .bounds import SCALE, check_numbers
from .errors import CLIError


def add_model(parser) -> None:
    parser.add_argument("--model", default=EDITORS[0], choices=EDITORS, help="which embedded editor")


def add_offload(parser) -> None:
    parser.add_argument(
        "--offload", action="store_true", help="keep only the running part on the GPU, for models that do not fit"
    )


def add_guidance(parser) -> None:
    parser.add_argument("--negative-prompt", help="what to avoid; Qwen's guidance needs one, if only a space")
    parser.add_argument(
        "--true-cfg-scale", type=float, help="strength of that guidance, above 1 (default: the model's)"
    )


def option(name: str) -> str:
    """The option of the command line for an argument."""
    return f"--{name.replace('_', '-')}"


def guidance(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments from the options of `add_guidance`."""
    check_numbers(args, true_cfg_scale=SCALE)
    try:
        return arguments.guidance(pipe, vars(args), option)
    except ValueError as error:
        raise CLIError(str(error)) from error

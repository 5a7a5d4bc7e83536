"""Options that several commands share, and what the machine needs."""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from typing import Any

from .bounds import SCALE, check_numbers
from .errors import CLIError
from .pipelines import EDITORS


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


def guidance(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments from the options of `add_guidance`."""
    check_numbers(args, true_cfg_scale=SCALE)
    given = {
        name: value for name in ("negative_prompt", "true_cfg_scale") if (value := getattr(args, name)) is not None
    }
    taken = inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    if "true_cfg_scale" not in taken:
        if "true_cfg_scale" in given:
            raise CLIError(f"--true-cfg-scale: expected none with {name}, got {args.true_cfg_scale:g}")
        return given
    scale = given.get("true_cfg_scale", taken["true_cfg_scale"].default)
    if "negative_prompt" in given and scale <= 1:
        whose = "" if "true_cfg_scale" in given else f", the default of {name}"
        raise CLIError(f"--negative-prompt: expected --true-cfg-scale above 1 with it, got {scale:g}{whose}")
    return given


def attention_here() -> dict[str, str]:
    """Settings that this machine needs: attention="torch" on a GPU without kernels, else none."""
    import torch

    from specedit_kernels.ops import check_gpu

    if torch.cuda.is_available():
        try:
            check_gpu(torch.device("cuda"))
        except (ImportError, RuntimeError) as error:
            print(f"specedit: no Triton kernels here, PyTorch instead: {error}", file=sys.stderr)
            return {"attention": "torch"}
    return {}


def silence_libraries() -> None:
    """Hide the libraries' start-up messages; keep errors."""
    warnings.filterwarnings("ignore", message="CUDA is not available or torch_xla")  # diffusers 0.36 without a GPU
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)

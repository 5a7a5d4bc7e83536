"""What the machine and the libraries need before a pipeline runs."""

from __future__ import annotations

import warnings


def attention_here() -> dict[str, str]:
    """Settings that this machine needs: another attention on a GPU without kernels, else none.

    Kernels are checked here, at a GPU's first use, and one warning says what cannot be used.
    """
    import torch

    from specedit_kernels import verdict

    if torch.cuda.is_available():
        found = verdict.verdict(torch.device("cuda"))
        if found.unavailable is not None:
            return {"attention": found.attention}
    return {}


def silence_libraries() -> None:
    """Hide the libraries' start-up messages; keep errors."""
    warnings.filterwarnings("ignore", message="CUDA is not available or torch_xla")  # diffusers 0.36 without a GPU
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)

"""What the machine and the libraries need before a pipeline runs."""

from __future__ import annotations

import sys
import warnings


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

"""GPU kernels for token sequences of mixed resolution, with a plain PyTorch path for CPUs.

Needs PyTorch alone; Triton is imported when a CUDA tensor first arrives.
"""

from ._version import __version__
from .api import (
    available_backends,
    contract_tokens,
    expand_tokens,
    gather_tokens,
    mixed_attention,
    qk_norm_rope,
    scatter_tokens,
    weighted_sum,
)
from .block_keep import BlockKeep
from .diffusers_backend import register_diffusers_backend
from .key_groups import KeyGroups
from .planning import AttentionPlan, plan
from .verdict import attention_backend, check_backend

__all__ = [
    "AttentionPlan",
    "BlockKeep",
    "KeyGroups",
    "__version__",
    "attention_backend",
    "available_backends",
    "check_backend",
    "contract_tokens",
    "expand_tokens",
    "gather_tokens",
    "mixed_attention",
    "plan",
    "qk_norm_rope",
    "register_diffusers_backend",
    "scatter_tokens",
    "weighted_sum",
]

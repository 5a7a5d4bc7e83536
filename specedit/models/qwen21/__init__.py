"""Qwen-Image-2.1; None where the installed diffusers does not have its pipeline."""

import diffusers

QwenImage21 = None
if hasattr(diffusers, "QwenImage21Pipeline"):
    from .edit import QwenImage21

__all__ = ["QwenImage21"]

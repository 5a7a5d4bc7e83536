"""Qwen-Image-Edit, its Plus variants (2509, 2511), and inpainting, None where the installed diffusers has none."""

import diffusers

from .edit import QwenImageEdit as QwenImageEdit
from .edit import QwenImageEditPlus as QwenImageEditPlus

QwenImageEditInpaint = None
if hasattr(diffusers, "QwenImageEditInpaintPipeline"):
    from .inpaint import QwenImageEditInpaint

__all__ = ["QwenImageEdit", "QwenImageEditInpaint", "QwenImageEditPlus"]

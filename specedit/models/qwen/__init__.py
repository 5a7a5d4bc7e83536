"""Qwen-Image-Edit and its Plus variants (2509, 2511)."""

from .edit import QwenImageEdit as QwenImageEdit
from .edit import QwenImageEditPlus as QwenImageEditPlus

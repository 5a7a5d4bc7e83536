"""LongCat-Image-Edit, or None where the installed diffusers does not have its pipeline."""

import diffusers

if hasattr(diffusers, "LongCatImageEditPipeline"):
    from .edit import LongCatImageEdit
else:
    LongCatImageEdit = None

__all__ = ["LongCatImageEdit"]

"""Adapters, one file or folder for each model family; each registers itself."""

from ..versions import check_diffusers

check_diffusers()  # an older one lacks what the adapters import, and python's own error would not say why

from .registry import adapter_of, adapters, pipeline_names, register_adapter, takes_class  # noqa: E402

__all__ = ["adapter_of", "adapters", "pipeline_names", "register_adapter", "takes_class"]

"""FLUX.2: dev, klein, klein-KV and klein's inpainting; each is None where the installed diffusers does not have it."""

import diffusers

Flux2Dev = Flux2Klein = Flux2KleinInpaint = Flux2KleinKV = None
if hasattr(diffusers, "Flux2Pipeline"):
    from .dev import Flux2Dev
if hasattr(diffusers, "Flux2KleinPipeline"):
    from .klein import Flux2Klein
if hasattr(diffusers, "Flux2KleinInpaintPipeline"):
    from .inpaint import Flux2KleinInpaint
if hasattr(diffusers, "Flux2KleinKVPipeline"):
    from .kv import Flux2KleinKV

__all__ = ["Flux2Dev", "Flux2Klein", "Flux2KleinInpaint", "Flux2KleinKV"]

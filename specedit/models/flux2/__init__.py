"""FLUX.2: dev, klein and klein-KV; each is None where the installed diffusers does not have its pipeline."""

import diffusers

Flux2Dev = Flux2Klein = Flux2KleinKV = None
if hasattr(diffusers, "Flux2Pipeline"):
    from .dev import Flux2Dev
if hasattr(diffusers, "Flux2KleinPipeline"):
    from .klein import Flux2Klein
if hasattr(diffusers, "Flux2KleinKVPipeline"):
    from .kv import Flux2KleinKV

__all__ = ["Flux2Dev", "Flux2Klein", "Flux2KleinKV"]

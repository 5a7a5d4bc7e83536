"""The methods through which every pipeline encodes: with `reuse_encodings` they return what they returned before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..models.shared.devices import execution_device
from .encodings import PICTURES, PROMPTS
from .installation import Installation, installation_of

DOORS = {"encode_prompt": PROMPTS, "_encode_vae_image": PICTURES}
GIVEN = ("prompt_embeds", "pooled_prompt_embeds")  # with these there is nothing to encode


def doors(stock: type) -> dict[str, Callable[..., Any]]:
    """The methods of `DOORS` that a pipeline's class has, for its accelerated subclass.

    Outside an accelerated call that reuses encodings, they are the class's own.
    """
    return {name: _door(stock, name) for name in DOORS if inspect.isfunction(getattr(stock, name, None))}


def _door(stock: type, name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(stock, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, installation = getattr(stock, name), installation_of(self)  # a library may have patched the class since
        reuse = None if installation is None else installation.encodings.current
        if installation is None or reuse is None or not is_pure(stock, name, installation):
            return own(self, *args, **kwargs)
        bound = inspect.signature(own).bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        if any(arguments.get(given) is not None for given in GIVEN) or (DOORS[name] == PICTURES and not reuse.pictures):
            return own(self, *args, **kwargs)
        scale = arguments.get("lora_scale")
        if scale is not None:
            self._lora_scale = scale  # as FLUX's own method leaves it
        return reuse.encode(DOORS[name], lambda: own(self, *args, **kwargs), arguments, execution_device(self))

    return method


def is_pure(stock: type, name: str, installation: Installation) -> bool:
    """Whether a method's result depends on nothing but its arguments and the pipeline's components: one of diffusers',
    this package's or the adapter's. What another class's own method reads is not known."""
    owner = next(base for base in stock.__mro__ if name in vars(base))
    known = owner in installation.adapter.calls
    return known or owner.__module__.partition(".")[0] in ("diffusers", __package__.partition(".")[0])

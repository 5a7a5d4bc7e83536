"""The embedded editors: a small FLUX-Kontext and a small Qwen-Image-Edit, and the tasks that they are measured on.

pipe = micro.load("kontext")
case = micro.scenes.sample(seed=7, size=512)
image = pipe(image=case.source, prompt=case.prompt, **micro.arguments(case.source, "kontext")).images[0]
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ..lazy import lazy as _lazy

if _TYPE_CHECKING:
    from . import scenes
    from .evaluate import arguments, evaluate, mean, summary
    from .load import load
    from .words import understood

__all__ = ["arguments", "evaluate", "load", "mean", "scenes", "summary", "understood"]

_lazy(
    __name__, arguments="evaluate", evaluate="evaluate", load="load", mean="evaluate", summary="evaluate",
    understood="words",
)  # fmt: skip

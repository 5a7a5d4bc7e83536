"""The embedded editors, a small FLUX-Kontext and a small Qwen-Image-Edit, and the tasks that measure them.

pipe = micro.load("kontext")
case = micro.scenes.sample(seed=7, size=512)
image = pipe(image=case.source, prompt=case.prompt, **micro.arguments(case.source, "kontext")).images[0]
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ..lazy import lazy as _lazy

if _TYPE_CHECKING:
    from ..evaluation.metrics import mean
    from . import scenes
    from .evaluation import arguments, evaluate, summary, texture_cases
    from .loading import STUDENT, load
    from .words import understood

__all__ = ["STUDENT", "arguments", "evaluate", "load", "mean", "scenes", "summary", "texture_cases", "understood"]

_lazy(
    __name__, STUDENT="loading", arguments="evaluation", evaluate="evaluation", load="loading", mean="evaluation",
    summary="evaluation", texture_cases="evaluation", understood="words",
)  # fmt: skip

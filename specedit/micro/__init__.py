"""The embedded editors: a small FLUX-Kontext and a small Qwen-Image-Edit, and the tasks that they are measured on.

pipe = micro.load("kontext")
case = micro.scenes.sample(seed=7, size=512)
image = pipe(image=case.source, prompt=case.prompt, **micro.arguments(case.source, "kontext")).images[0]
"""

from . import scenes
from .evaluation import arguments, evaluate, mean, summary
from .loading import STUDENT, load

__all__ = ["STUDENT", "arguments", "evaluate", "load", "mean", "scenes", "summary"]

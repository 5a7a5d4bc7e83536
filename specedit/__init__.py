"""SpecEdit: many times faster diffusion image editing, without retraining.

pipe = specedit.install(pipe, "balanced")
image = pipe(image=picture, prompt="make the car red").images[0]
specedit.uninstall(pipe)
"""

from importlib import import_module as _import_module

from .versions import no_word_of_torchvision as _no_word_of_torchvision

with _no_word_of_torchvision():
    # The functions below share their names with the modules they come from, so the modules are bound first.
    from . import config, flops  # noqa: F401
    from . import report as _report_module  # noqa: F401
    from .config import SpecEditConfig, presets
    from .install import disabled, install, report, uninstall
    from .report import RunReport, StageReport
    from .sizes import size_for

__version__ = "0.1.0"
__all__ = [
    "RunReport", "SpecEditConfig", "StageReport", "disabled", "flops", "install", "micro", "presets", "report",
    "size_for", "uninstall",
]  # fmt: skip


def __getattr__(name: str):
    if name == "micro":  # only who uses the embedded editor pays for its imports
        return _import_module(".micro", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

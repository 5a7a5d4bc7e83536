"""SpecEdit: many times faster diffusion image editing, without retraining.

pipe = specedit.install(pipe, "balanced")
image = pipe(image=picture, prompt="make the car red").images[0]
specedit.uninstall(pipe)
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .lazy import lazy as _lazy
from .versions import package_version as _package_version

if _TYPE_CHECKING:
    from . import flops, micro
    from .config import SpecEditConfig, presets
    from .install import disabled, install, report, uninstall
    from .report import RunReport, StageReport
    from .sizes import size_for

__version__ = _package_version()
__all__ = [
    "RunReport", "SpecEditConfig", "StageReport", "disabled", "flops", "install", "micro", "presets", "report",
    "size_for", "uninstall",
]  # fmt: skip

_lazy(
    __name__,
    RunReport="report",
    SpecEditConfig="config",
    StageReport="report",
    disabled="install",
    install="install",
    presets="config",
    report="install",
    size_for="sizes",
    uninstall="install",
)

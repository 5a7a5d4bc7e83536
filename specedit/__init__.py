"""SpecEdit: many times faster diffusion image editing, without retraining.

pipe = specedit.install(pipe, "balanced")
image = pipe(image=picture, prompt="make the car red").images[0]
specedit.uninstall(pipe)
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .lazy import lazy as _lazy
from .versions import package_version as _package_version

if _TYPE_CHECKING:
    from . import micro
    from .api.installing import disabled, install, report, uninstall
    from .api.session import Session
    from .api.sizes import size_for
    from .config import SpecEditConfig, presets
    from .cost import flops
    from .forecast_options import register_forecast
    from .method.selectors import register_selector
    from .method_options import register_method
    from .models.registry import register_adapter
    from .run_report import RunReport, StageReport

__version__ = _package_version()
__all__ = [
    "RunReport", "Session", "SpecEditConfig", "StageReport", "disabled", "flops", "install", "micro", "presets",
    "register_adapter", "register_forecast", "register_method", "register_selector", "report", "size_for", "uninstall",
]  # fmt: skip

_lazy(
    __name__,
    RunReport="run_report",
    Session="api.session",
    SpecEditConfig="config",
    StageReport="run_report",
    disabled="api.installing",
    flops="cost",
    install="api.installing",
    presets="config",
    register_adapter="models.registry",
    register_forecast="forecast_options",
    register_method="method_options",
    register_selector="method.selectors",
    report="api.installing",
    size_for="api.sizes",
    uninstall="api.installing",
)

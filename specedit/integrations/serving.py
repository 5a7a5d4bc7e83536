"""What the plugins of servers share: settings of the server and of each request, and a line in the log for each.

Settings of the server come from the environment:

    SPECEDIT_SERVER_ENABLED    0 leaves every pipeline as it is; 1 by default
    SPECEDIT_SERVER_PRESET     a preset's name, "balanced" by default
    SPECEDIT_SERVER_SETTINGS   a JSON object with fields of SpecEditConfig, such as {"restore": "reference"}
    SPECEDIT_SERVER_FILES      the folder whose files requests may name; by default they may name none

Settings of a request are `preset`, `edit_mask`, and `specedit`, an object with any of `FIELDS`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch import settings
from ..checks import suggest
from . import request_files

if TYPE_CHECKING:
    from ..api.installation import CallRecord
    from ..config import SpecEditConfig

PREFIX = "SPECEDIT_SERVER_"
VARIABLES = ("ENABLED", "PRESET", "SETTINGS", "FILES")
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
NAMES = ("edit_mask", "preset", "specedit")
FIELDS = ("threshold", "dilation", "restore", "keep_pixels")  # a request loads no files and sets no method
STEPS = "num_inference_steps"
logger = logging.getLogger("specedit")


@dataclass(frozen=True)
class Server:
    """Settings of the server. asked: preset and fields by name. files: where requests' files are."""

    enabled: bool = True
    asked: Mapping[str, Any] = field(default_factory=dict)
    files: Path | None = None

    @classmethod
    def from_environment(cls) -> Server:
        """Read and check the variables.

        Raises:
            TypeError, ValueError: naming the variable, what was expected and what came.
        """
        given = {name.removeprefix(PREFIX): value for name, value in os.environ.items() if name.startswith(PREFIX)}
        for name in given:
            if name not in VARIABLES:
                known = ", ".join(PREFIX + one for one in VARIABLES)
                raise ValueError(f"{PREFIX}{name}: expected one of {known}{suggest(name, VARIABLES)}")
        switch = given.get("ENABLED", "1").lower()
        if switch not in SWITCH:
            raise ValueError(f"{PREFIX}ENABLED: expected one of {', '.join(SWITCH)}, got {switch!r}")
        asked = _object(f"{PREFIX}SETTINGS", given.get("SETTINGS", "{}"), settings.FIELDS)
        if preset := given.get("PRESET"):
            asked["preset"] = preset
        files = Path(given["FILES"]).expanduser() if given.get("FILES") else None
        if files is not None and not files.is_dir():
            raise ValueError(f"{PREFIX}FILES: expected a folder, got {given['FILES']!r}")
        try:
            settings.check(asked)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{PREFIX}PRESET and {PREFIX}SETTINGS: {error}") from error
        return cls(SWITCH[switch], asked, files)

    def config_of(self, request: Mapping[str, Any]) -> SpecEditConfig:
        """The configuration of a request: its preset and fields before the server's.

        Raises:
            TypeError, ValueError: naming what was expected and what came.
        """
        fields = _object("specedit", request.get("specedit") or {}, FIELDS)
        preset = {} if request.get("preset") is None else {"preset": request["preset"]}
        return settings.check({**self.asked, **preset, **fields}).config


def install(pipe: Any) -> bool:
    """Install SpecEdit with the server's settings, where it serves the pipeline. Whether it did.

    Raises:
        TypeError, ValueError: a setting. The pipeline is then as it was.
    """
    from ..api.installing import install as install_on
    from ..models.registry import adapter_of
    from ..pipelines.machine import attention_here

    _show_log()
    server = Server.from_environment()
    if not server.enabled:
        logger.info("%sENABLED is off: %s stays as it is", PREFIX, type(pipe).__name__)
        return False
    if adapter_of(pipe) is None:
        logger.warning("SpecEdit does not serve %s; it stays as it is", type(pipe).__name__)
        return False
    config = server.config_of({})
    here: dict[str, Any] = attention_here()
    install_on(pipe, config, **here)
    logger.info("SpecEdit %s is installed on %s", config.name, type(pipe).__name__)
    return True


def check(request: Mapping[str, Any]) -> None:
    """Check a request's settings without a pipeline. Raises as `prepare`."""
    server = Server.from_environment()
    server.config_of(request)
    image = request_files.read_picture(request.get("image"), server.files)
    if request.get("edit_mask") is not None:
        request_files.read_mask(request["edit_mask"], server.files, image)


def prepare(pipe: Any, call: dict[str, Any], request: Mapping[str, Any], *, asks_steps: bool) -> None:
    """Put a request's settings in place for this thread's next call of `pipe`.

    call: arguments of the pipeline; gets the mask and the picture, and loses what the pipeline does not take.
    request: holds `NAMES`, or some of them. asks_steps: whether the client asked for the call's num_inference_steps.
    Otherwise the preset's steps run, and the report's `overruled_steps` says so.

    Raises:
        TypeError, ValueError: naming what was expected and what came. Pipeline and later requests are as they were.
    """
    from ..api.installation import installation_of
    from ..api.installing import serve_next
    from ..api.served import Served
    from ..config import resolve

    given = [name for name in NAMES if request.get(name) is not None]
    if (installation := installation_of(pipe)) is None:
        if given:
            raise ValueError(f"{given[0]}: expected a pipeline with SpecEdit, got a plain {type(pipe).__name__}")
        return
    server = Server.from_environment()
    # The machine's own attention was settled when SpecEdit was installed.
    config = resolve(server.config_of(request), attention=installation.config.attention)
    image = request_files.read_picture(call.get("image"), server.files)
    mask = None
    if request.get("edit_mask") is not None:
        mask = request_files.read_mask(request["edit_mask"], server.files, image)
    for name in NAMES:
        call.pop(name, None)
    call |= {name: value for name, value in (("image", image), ("edit_mask", mask)) if value is not None}
    steps = call.get(STEPS)
    asked = steps if asks_steps else None
    serve_next(pipe, Served(config, not asks_steps, lambda record: _logged(record, asked)))


@contextmanager
def _logged(record: CallRecord, asked_steps: int | None) -> Iterator[None]:
    """Log what the call inside warns of, which servers drop, and what it did."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(one.message) for one in seen if one.category is UserWarning):
                logger.warning("%s", text)
    asked = "" if asked_steps is None else f"; the client asked for {asked_steps} steps"
    if record.report is not None:
        logger.info("%s%s", record.report.title(), asked)
    else:
        logger.warning("the stock pipeline ran: %s%s", record.stock_reason, asked)


def _object(name: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """An object with known names, given as one or as JSON."""
    value = settings.parsed(name, value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object of settings, got {value!r}")
    for one in value:
        if one not in known:
            raise ValueError(f"{name}: expected any of {', '.join(known)}, got {one!r}{suggest(one, known)}")
    return dict(value)


def _show_log() -> None:
    """Have the log show a line a request, unless the server has set that up otherwise."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s specedit: %(message)s"))
        logger.addHandler(handler)

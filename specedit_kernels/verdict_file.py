"""The file in the user's cache that holds what was found of each GPU with each set of versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .self_check import Finding

Identity = dict[str, Any]
_MOST = 16  # GPUs and versions that the file holds; the oldest goes
_HERE = Path(__file__).parent
_DRIVER = Path("/proc/driver/nvidia/version")


def path() -> Path:
    """Where the file is: in XDG_CACHE_HOME if that is an absolute path, else in ~/.cache."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "specedit" / "kernels.json"


def identity(device: torch.device) -> Identity:
    """What a finding depends on: GPU, driver, versions, and the kernels' code with its launch parameters."""
    return versions(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def versions(gpu: str | None, capability: tuple[int, int] | None) -> Identity:
    """The identity of a GPU that is called `gpu`, or of none, on this machine."""
    return {
        "gpu": gpu,
        "capability": None if capability is None else list(capability),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": package("triton"),
        "specedit_kernels": __version__,
        "kernels": _digest(),
    }


def package(name: str) -> str | None:
    """An installed package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The NVIDIA driver's version as its module reports it, else the CUDA version that it supports."""
    with contextlib.suppress(OSError):
        words = _DRIVER.read_text().split()
        found = [word for word in words if word[:1].isdigit() and word.count(".") in (1, 2)]
        if found:
            return found[0]
    with contextlib.suppress(Exception):
        return f"CUDA {getattr(torch._C, '_cuda_getDriverVersion')()}"  # noqa: B009 - absent from a build for CPUs
    return None


def _digest() -> str:
    digest = hashlib.sha256()
    for file in sorted([*(_HERE / "gpu").rglob("*.py"), *(_HERE / "gpu").rglob("*.json"), *_HERE.glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def read(of: Identity) -> list[Finding] | None:
    """The findings of an identity; None if there are none, or the file is missing or unreadable."""
    for entry in _entries():
        if entry.get("of") == of:
            with contextlib.suppress(TypeError, KeyError):
                return [Finding(**finding) for finding in entry["findings"]]
    return None


def write(of: Identity, findings: list[Finding]) -> bool:
    """Add findings to the file, completely or not at all; whether that was possible."""
    kept = [entry for entry in _entries() if entry.get("of") != of][-_MOST + 1 :]
    # JSON has no infinity: an error that is infinite is the largest number.
    plain = [asdict(f) | {"error": None if f.error is None else min(f.error, 1e300)} for f in findings]
    text = json.dumps({"checks": [*kept, {"of": of, "findings": plain}]}, indent=1) + "\n"
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".kernels-", suffix=".json", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as out:
                out.write(text)
            os.replace(part, file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _entries() -> list[dict[str, Any]]:
    try:
        content = json.loads(path().read_text())
        return [entry for entry in content["checks"] if isinstance(entry, dict)]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):  # RuntimeError: no home folder
        return []

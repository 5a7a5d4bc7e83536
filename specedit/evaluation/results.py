"""Result files: rows with the command and the machine that measured them."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..hardware import cpu_name
from ..io.files import write_text


def machine() -> dict[str, Any]:
    """The machine and versions of a measurement; None for what is absent."""
    cuda = torch.cuda.is_available()
    # OMP_WAIT_POLICY changes CPU timings, so record it.
    policy = os.environ.get("OMP_WAIT_POLICY")
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        **({"wait_policy": policy} if policy else {}),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": diffusers.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write {"machine", "command", ..., "rows"} completely or not at all; nan becomes null.

    `more`: further fields, and "machine" if it is not this one.
    """
    content = {"machine": more.get("machine") or machine(), "command": command, **more, "rows": rows}
    write_text(path, json.dumps(_plain(content), indent=1) + "\n")


def fingerprint(path: Path | None) -> str | None:
    """First 12 hexadecimal digits of the SHA-256 of a file, or of a folder's .safetensors files; None without it."""
    if path is None or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" if its code is not that of the commit; None outside one."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = _output(*git, "rev-parse", "--short", "HEAD")
    code = (":/specedit", ":/specedit_kernels", ":/benchmarks/*.py")  # result files change while they are made
    changed = _output(*git, "status", "--porcelain", "--", *code)
    return f"{commit}-dirty" if commit and changed else commit


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None

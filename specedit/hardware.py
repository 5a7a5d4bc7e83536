"""What a machine has: names for result files and reports."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first core, by its names; empty elsewhere."""
    try:
        first, _, _ = CPUINFO.read_text().partition("\n\n")
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_name() -> str:
    """The processor's name, as the system gives it, and on x86 its family and model: several may share a name."""
    said = cpuinfo()
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in said or "model" not in said:
        return name
    return f"{name} (family {said['cpu family']}, model {said['model']})"


def compiler() -> str | None:
    """The C compiler that Triton would call, with its version; None without one."""
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        return None
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{found}, which does not run"
    return f"{found} ({(said.splitlines() or ['version unknown'])[0]})"

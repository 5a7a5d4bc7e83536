"""What runs on this machine, and whether it is right: `specedit doctor` as data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specedit_kernels import ops, self_check, timing, verdict, verdict_file
from specedit_kernels.checks import debug_enabled, switch
from specedit_kernels.self_check import Finding
from specedit_kernels.self_check_cases import ATTENTION, MERGED

from . import hardware
from .versions import package_version

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "safetensors")
GPU, INTERPRETER, PYTORCH = "GPU", "interpreter", "PyTorch"
INTERPRETER_SECONDS = 120  # it takes a few; more means that it hangs
Report = dict[str, Any]


def examine(device: torch.device | None = None, *, interpreter: bool = True) -> Report:
    """Check and time what attention and the other kernels run on.

    Args:
        device: of the tensors; the current GPU, else the CPU, if None.
        interpreter: whether kernels are checked in Triton's interpreter where there is no GPU.

    Returns:
        "versions", "machine", "kernels", "checks" (one entry for every case: "where", and what `Finding` holds),
        "timings", "auto" ("attention", "others", "why"), "advice", and "problems": what is wrong and would be used.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = verdict.guarded(device) or device.type == "cuda"
    switch("SPECEDIT_KERNELS_SELF_CHECK", default=True)
    debug_enabled()  # a value that it does not take would look like faults of every kernel
    skipped = _why_not_interpreted(gpu, interpreter)
    process = _start_interpreter() if skipped is None else None
    judged = verdict.find(device, anew=True) if gpu else None
    checks = _checks(device, judged)
    report: Report = {
        "versions": versions(),
        "machine": machine(device, gpu),
        "kernels": kernels(device, judged),
        "checks": checks,
        "timings": [asdict(one) for one in _timings(device, judged)],
        "auto": auto(judged),
    }
    report["kernels"]["interpreter"] = skipped if process is None else _finish_interpreter(process, checks)
    report["problems"] = [f"{one['where']}: {one['said']}" for one in checks if not one["passed"]]
    report["advice"] = advice(report)
    return report


def _why_not_interpreted(gpu: bool, asked: bool) -> str | None:
    if gpu:
        return "the GPU checks the kernels"
    if not asked:
        return "it was not asked to"
    return "TRITON_INTERPRET=1: this process interprets" if os.environ.get("TRITON_INTERPRET") == "1" else None


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of what it runs on."""
    found = {name: verdict_file.package(name) for name in PACKAGES}
    return {
        "specedit": package_version(),
        "python": platform.python_version(),
        **(found | {"torch": torch.__version__}),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


def machine(device: torch.device, gpu: bool) -> dict[str, Any]:
    """GPU, driver, CPU and compiler; None for what is absent."""
    identity = verdict_file.identity(device) if gpu else {}
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "gpu": identity.get("gpu"),
        "capability": identity.get("capability"),
        "memory": memory,
        "driver": identity.get("driver"),
        "cpu": hardware.cpu_name(),
        "threads": torch.get_num_threads(),
        "compiler": hardware.compiler(),
    }


def kernels(device: torch.device, judged: verdict.Verdict | None) -> dict[str, Any]:
    """Whether the Triton kernels run, with which launch parameters, and where findings are kept."""
    if judged is None:
        why = "there is no GPU" if device.type == "cpu" else f"expected a CUDA GPU, got {device.type}"
        return {"run": False, "why": why, "launch_parameters": None, "findings": None}
    parameters = None
    if judged.unavailable is None:
        from specedit_kernels.gpu import launch

        parameters = launch.file_of(device)
    return {
        "run": judged.unavailable is None, "why": judged.unavailable, "launch_parameters": parameters,
        "findings": str(verdict_file.path()),
    }  # fmt: skip


def auto(judged: verdict.Verdict | None) -> dict[str, Any]:
    """What attention="auto" takes for mixed stages, and why."""
    if judged is None:
        return {"attention": "torch", "others": "torch", "why": "PyTorch with a mask, because there is no GPU"}
    others = "torch" if judged.unavailable is not None else "triton"
    failed = sorted({one.kernel for one in judged.failed} - {ATTENTION, ops.PINGPONG, MERGED})
    if others == "triton" and failed:
        others = f"triton, but torch for {', '.join(failed)}"
    why = {
        "triton": "the Triton kernel passed its check",
        "merged": f"merged passes of PyTorch's attention, because of the kernel: {judged.why_not(ATTENTION)}",
        "torch": f"PyTorch with a mask, because of merged passes: {judged.why_not(MERGED)}",
    }
    return {"attention": judged.attention, "others": others, "why": why[judged.attention]}


def advice(report: Report) -> list[str]:
    """What a user may do about what was found."""
    said = []
    taken, times = report["auto"]["attention"], {}
    for one in report["timings"]:
        if one["shape"] == "mixed" and one["ms"] is not None:
            times[one["provider"]] = one["ms"]
    quickest = min(times, key=lambda name: times[name], default=taken)
    if report["machine"]["gpu"] is not None and quickest != taken and times[quickest] < 0.9 * times.get(taken, 0):
        said.append(f'attention="{quickest}" is faster here for mixed stages than "{taken}", which auto takes')
    if report["machine"]["gpu"] is not None and not report["kernels"]["run"]:
        said.append(f"the kernels would run with this mended: {report['kernels']['why']}")
    return said


def _checks(device: torch.device, judged: verdict.Verdict | None) -> list[dict[str, Any]]:
    """What was found of the kernels, and PyTorch's paths in both half types."""

    def on_pytorch(backend: str, name: str, args: tuple[Any, ...]) -> Any:
        return ops.run("torch" if backend == "triton" else backend, name, args)

    found = () if judged is None else judged.findings
    checks = [_entry(PYTORCH if one.kernel == MERGED else GPU, one) for one in found]
    backends = ("triton",) if found else ("triton", MERGED)  # merged attention is among what was found
    for half in (torch.bfloat16, torch.float16):
        paths = self_check.run_checks(device, on_pytorch, backends=backends, half=half)
        checks += [_entry(PYTORCH, one) for one in paths]
    return checks


def _entry(where: str, finding: Finding) -> dict[str, Any]:
    error = None if finding.error is None else min(finding.error, 1e300)  # JSON has no infinity
    return {"where": where, **asdict(finding), "error": error, "passed": finding.passed, "said": str(finding)}


def _timings(device: torch.device, judged: verdict.Verdict | None) -> list[timing.Timing]:
    on_gpu = device.type == "cuda"
    runs_triton = judged is not None and judged.allows(ATTENTION)
    providers = ("triton", MERGED, "torch") if runs_triton else (MERGED, "torch")
    dtype, repeats = (torch.bfloat16, 10) if on_gpu else (torch.float32, 3)
    return timing.time_all(device, dtype, providers, full_size=on_gpu, repeats=repeats)


def _start_interpreter() -> subprocess.Popen[str] | None:
    """The kernels' check in Triton's interpreter, at work beside this process; None without Triton."""
    if verdict_file.package("triton") is None:
        return None
    packages = str(Path(ops.__file__).parents[1])
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "specedit_kernels.self_check"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def _finish_interpreter(process: subprocess.Popen[str], checks: list[dict[str, Any]]) -> str | None:
    """Add what the interpreter found to `checks`; returns why it found nothing, or None."""
    try:
        out, error = process.communicate(timeout=INTERPRETER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"Triton's interpreter took more than {INTERPRETER_SECONDS} s"
    checks += [_entry(INTERPRETER, Finding(**json.loads(line))) for line in out.splitlines()]
    if process.returncode:
        return f"Triton's interpreter stopped: {(error.strip().splitlines() or ['no message'])[-1]}"
    return None

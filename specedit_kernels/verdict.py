"""What may be used on a device: the kernels that passed their check there, and PyTorch in place of the others.

The first use of a GPU with these versions checks every kernel (`self_check`). Findings are kept in one JSON file,
`specedit/kernels.json` in XDG_CACHE_HOME or ~/.cache. SPECEDIT_KERNELS_SELF_CHECK=0 uses every kernel unchecked.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from . import ops, ready, self_check, verdict_file
from .checks import switch
from .ops import PINGPONG
from .self_check import Finding
from .self_check_cases import ATTENTION, MERGED

_lock = threading.Lock()
_known: dict[torch.device, Verdict] = {}


@dataclass(frozen=True)
class Verdict:
    """What a device's kernels may be used for.

    Attributes:
        unavailable: why no Triton kernel runs there, or None.
        findings: of every case that was checked; none without a check.
    """

    unavailable: str | None = None
    findings: tuple[Finding, ...] = ()

    @cached_property
    def failed(self) -> list[Finding]:
        """The findings of cases that failed."""
        return [finding for finding in self.findings if not finding.passed]

    @cached_property
    def wrong(self) -> frozenset[str]:
        """The kernels of those cases."""
        return frozenset(finding.kernel for finding in self.failed)

    def allows(self, kernel: str) -> bool:
        """Whether an operator's Triton kernel, "pingpong" or "merged" attention, is used where nobody asks for it by
        name."""
        return kernel not in self.wrong and (kernel == MERGED or self.unavailable is None)

    @property
    def attention(self) -> str:
        """The backend of attention with a bias per area: "triton", else "merged", else "torch"."""
        return "triton" if self.allows(ATTENTION) else MERGED if self.allows(MERGED) else "torch"

    def why_not(self, kernel: str) -> str | None:
        """Why a kernel is not used, or None."""
        if kernel != MERGED and self.unavailable is not None:
            return self.unavailable
        found = [str(finding) for finding in self.failed if finding.kernel == kernel]
        return "; ".join(found) or None

    def __str__(self) -> str:
        """The warning's text."""
        said = []
        if self.unavailable is not None:
            said.append(f"no Triton kernel runs here: {self.unavailable}")
        if self.failed:
            said.append(f"failed their check: {'; '.join(map(str, self.failed))}")
        taken = "PyTorch takes their place"
        if PINGPONG in self.wrong:
            others = ", and PyTorch that of the others" if len(self.wrong) > 1 else ""
            taken = f"The plain kernel of attention takes the place of {PINGPONG}{others}"
        return f"specedit_kernels: {'; '.join(said)}. {taken}; `specedit doctor` tells more."


def guarded(device: torch.device) -> bool:
    """Whether kernels are launched for tensors of this device, and are to be checked before."""
    return device.type == "cuda" and switch("SPECEDIT_KERNELS_SELF_CHECK", default=True)


def verdict(device: torch.device) -> Verdict:
    """The device's verdict; the first one of a device checks it, reads its values, and warns once if anything failed.

    Raises:
        ValueError: SPECEDIT_KERNELS_SELF_CHECK is neither on nor off.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    known = _known.get(device)
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return Verdict()  # nothing can be read inside a graph; the next use outside checks
    with _lock:
        if device not in _known:
            try:
                found = find(device)
            except torch.OutOfMemoryError:
                return Verdict()  # says nothing about a kernel; the next use tries again
            _known[device] = found
            if found.unavailable is not None or found.failed:
                warnings.warn(str(found), stacklevel=2)
        return _known[device]


def forget() -> None:
    """Forget the verdicts of this process, so that the next use reads the file, or checks anew."""
    with _lock:
        _known.clear()
        ready.forget()  # a prepared launch asks for no verdict


def find(device: torch.device, *, anew: bool = False) -> Verdict:
    """The verdict of a device, from the file or from a check, whose findings the file then holds.

    anew: check in any case, and in both half-precision types; the first use checks bfloat16 and float32.
    """
    try:
        ops.check_gpu(device)
    except (ImportError, RuntimeError) as error:
        return Verdict(str(error), tuple(self_check.run_checks(device, backends=(MERGED,))))
    identity = verdict_file.identity(device)
    findings = None if anew else verdict_file.read(identity)
    if findings is None:
        findings = self_check.run_checks(device)
        if anew:
            findings += self_check.run_checks(device, half=torch.float16)
        verdict_file.write(identity, findings)
    return Verdict(None, tuple(findings))


def _kernel_of(operator: str) -> str:
    """What findings call an operator's kernel: that of its twin NAME_out is the same."""
    return operator.removesuffix("_out")


def backend_for(name: str, args: tuple[Any, ...]) -> str:
    """The backend of an operator whose tensors are on a GPU, where the call names none."""
    device = args[0].device
    found = _known.get(device)  # every call asks
    if found is None:
        if not guarded(device):
            return "triton"
        found = verdict(device)
    kernel = _kernel_of(name)
    if found.allows(kernel):
        return "triton"
    lists = len(args) > 9 and args[9] is not None
    return MERGED if kernel == ATTENTION and found.allows(MERGED) and not lists else "torch"


def uses_pingpong(device: torch.device) -> bool:
    """Whether launch parameters may choose the ping-pong kernel: it passed its check, or nothing is checked."""
    found = _known.get(device)
    return not guarded(device) if found is None else found.allows(PINGPONG)


def _chosen(name: str, args: tuple[Any, ...]) -> str:
    chosen = backend_for(name, args)
    if chosen == "triton" and _kernel_of(name) == ATTENTION and uses_pingpong(args[0].device):
        return PINGPONG
    return chosen


def require(name: str, device: torch.device) -> None:
    """RuntimeError if an operator's kernel, asked for by name, has failed its check on this device."""
    if torch.compiler.is_compiling() or not guarded(device):
        return
    found = verdict(device)
    if found.unavailable is None and (why := found.why_not(_kernel_of(name))) is not None:
        raise RuntimeError(
            f'{name}: expected a kernel that passes its check on this GPU for backend="triton", got {why}; '
            "backend=None takes PyTorch in its place, and SPECEDIT_KERNELS_SELF_CHECK=0 runs it all the same"
        )


def attention_backend(device: torch.device) -> str:
    """The backend that attention with a bias per area takes on a device where none is named.

    "triton" on a GPU whose kernel passed its check, else "merged" if that did, else "torch"; "torch" off GPUs. The
    first call for a GPU may check its kernels.
    """
    if not guarded(device):
        return "triton" if device.type == "cuda" else "torch"
    return verdict(device).attention


def check_backend(backend: str | None, device: torch.device) -> None:
    """Find out before any work what a backend can do on a device.

    With None on a GPU, the kernels are checked, and one warning says what PyTorch takes over.

    Raises:
        ImportError, RuntimeError: "triton" where no kernel runs or where one failed its check.
    """
    if device.type == "cuda" and backend == "triton":
        ops.check_gpu(device)
        require(ATTENTION, device)
    elif backend is None and guarded(device):
        verdict(device)


ops.choose_backends_by(_chosen)

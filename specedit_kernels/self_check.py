"""Every kernel against plain PyTorch in float64, on small inputs.

    from specedit_kernels import self_check

    for finding in self_check.run_checks(torch.device("cuda")):
        print(finding)

`TRITON_INTERPRET=1 python -m specedit_kernels.self_check` checks the kernels in Triton's interpreter, without a GPU.

A result may have at most twice the error of the same computation in PyTorch at the same precision and one rounding of
its largest value, or 1e-5 of that value, which the approximate exponentials and logarithms of a GPU reach in float32.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import ops, ready
from .ops import PINGPONG
from .self_check_cases import (
    ATTENTION,
    MERGED,
    Case,
    attention_in_own_precision,
    cases,
    pingpong_cases,
    planned_cases,
    split_cases,
)

FLOOR = 1e-5
Run = Callable[[str, str, tuple[Any, ...]], Any]  # backend, operator and its arguments, as `ops.run` takes them


@dataclass(frozen=True)
class Finding:
    """How one case went. error, allowed: shares of the largest value; None where it did not run, and `why` says so."""

    kernel: str
    label: str
    error: float | None = None
    allowed: float | None = None
    why: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.allowed is not None and self.error <= self.allowed

    def __str__(self) -> str:
        if self.why is not None or self.error is None:
            return f"{self.kernel} ({self.label}): {self.why}"
        return f"{self.kernel} ({self.label}): error {self.error:.1e}, at most {self.allowed:.1e} expected"


def run_checks(
    device: torch.device, run: Run | None = None, *, backends: tuple[str, ...] = ("triton", MERGED),
    half: torch.dtype = torch.bfloat16,
) -> list[Finding]:  # fmt: skip
    """Check the kernels on a device, whose results are read.

    Args:
        device: where the inputs are.
        run: how an operator is run on a backend; `specedit_kernels.ops.run` if None.
        backends: which of them are checked.
        half: the half-precision type of the inputs; some cases are in float32.

    Raises:
        torch.OutOfMemoryError: the device has no memory left, which says nothing about a kernel.
    """
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            chosen = [case for case in cases(device, half) if case.backend in backends]
            findings = [check(case, ops.run if run is None else run) for case in chosen]
            if run is None and "triton" in backends:
                findings += _made(planned_cases, ATTENTION, "planned", device, half)
                findings += _made(split_cases, ATTENTION, "split", device, half)
                findings += _made(pingpong_cases, PINGPONG, "launch parameters", device, half)
            return findings
    finally:
        ready.forget()  # a kernel that failed would run again for arguments like these


def check(case: Case, run: Run) -> Finding:
    """Run a case and compare it. Whatever is raised, but for a lack of memory, is the finding."""

    def plain(backend: str, name: str, args: tuple[Any, ...]) -> Any:
        return ops.run("torch", name, args)

    try:
        got = _outputs(case, case.args, run)
        exact = _outputs(case, _in_float64(case.args), plain)
        own = (lambda backend, name, args: attention_in_own_precision(*args)) if case.operator == ATTENTION else plain
        same = _outputs(case, case.args, own)
        errors = [_compared(*three) for three in zip(got, exact, same, strict=True) if three[1].numel()]
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:
        return _failed(case.kernel, case.label, raised)
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    return Finding(case.kernel, case.label, error, allowed)


def _made(
    make: Callable[[torch.device, torch.dtype], Iterator[Case]], kernel: str, label: str, device: torch.device,
    half: torch.dtype,
) -> list[Finding]:  # fmt: skip
    """The findings of cases whose making may fail too: a kernel makes plans."""
    try:
        return [check(case, ops.run) for case in make(device, half)]
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:
        return [_failed(kernel, label, raised)]


def _failed(kernel: str, label: str, raised: Exception) -> Finding:
    first = (str(raised).strip().splitlines() or [""])[0]
    return Finding(kernel, label, why=f"{type(raised).__name__}: {first}")


def _compared(got: torch.Tensor, exact: torch.Tensor, same: torch.Tensor) -> tuple[float, float]:
    """Error and what is allowed, both as shares of the largest exact value; infinite where they cannot be compared."""
    finite = exact.isfinite()
    if got.shape != exact.shape or not torch.equal(got.double()[~finite], exact[~finite]):
        return math.inf, 1.0
    largest = exact[finite].abs().max().item() or 1.0
    error, yardstick = ((x.double() - exact)[finite].abs().max().item() / largest for x in (got, same))
    allowed = max(FLOOR, 2 * yardstick + torch.finfo(got.dtype).eps)
    return (error if error == error else math.inf), allowed


def _outputs(case: Case, args: tuple[Any, ...], run: Run) -> tuple[torch.Tensor, ...]:
    """What a call makes. Outputs that are arguments are copied before, so that every call finds the same."""
    args = tuple(arg.clone() if i in case.written else arg for i, arg in enumerate(args))
    result = run(case.backend, case.operator, args)
    if case.written:
        return tuple(args[i] for i in case.written)
    return result if isinstance(result, tuple) else (result,)


def _in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with those in the first one's dtype in float64."""
    own = args[0].dtype
    return tuple(arg.double() if isinstance(arg, torch.Tensor) and arg.dtype == own else arg for arg in args)


def main() -> None:
    """Print the findings of the kernels in Triton's interpreter as JSON, one line each, as they come.

    The interpreter is chosen before Triton is imported, so this is a process of its own.
    """
    from . import gpu  # noqa: F401 - raises here, and not in every case, where Triton does not work

    with torch.no_grad():
        cpu, half = torch.device("cpu"), torch.float16  # the interpreter gets bfloat16 wrong
        for case in itertools.chain(cases(cpu, half), planned_cases(cpu, half)):
            if case.backend == "triton":
                print(json.dumps(asdict(check(case, ops.run))), flush=True)


if __name__ == "__main__":
    main()

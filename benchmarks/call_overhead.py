"""Host overhead of an accelerated call: what it takes beside the transformer's own operators.

    python -m benchmarks.call_overhead [--before CHECKOUT] [--rounds N] [--json FILE]

One edit of 256 px by the embedded Kontext editor with turbo and restore="reference", on one thread. A profiler divides
the CPU time of a call into the transformer's operators, other operators (text encoders, autoencoder, verification and
the sampler's arithmetic), and Python: all time that is in no operator. The last two are the overhead. With --before,
another checkout is measured in alternation, in processes of their own, and the ratios are printed. Times are medians
over all calls of CPU time. The profiler slows Python down, the same in both; `call_ms` is without it, and
`python_calls` counts the calls of functions, which no other process on the machine changes. A profiler does not see
what `a + b` calls, so tensors' arithmetic goes through functions that it sees.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALLS, WARM_UP, ROUNDS = 3, 2, 3
TIMES = ("overhead_ms", "operators_ms", "python_ms", "transformer_ms", "call_ms")
COLUMNS = (*TIMES, "python_calls")
ARITHMETIC = [
    f"__{kind}{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "matmul") for kind in ("", "r", "i")
] + ["__neg__", "__invert__", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__"]


def make_call() -> tuple[Any, Callable[[], Any]]:
    """The pipeline, and the call that is measured."""
    import torch

    import specedit
    from specedit import micro

    torch.set_num_threads(1)
    pipe = micro.load("kontext")
    pipe.set_progress_bar_config(disable=True)
    case = micro.scenes.sample(seed=7, size=256)
    specedit.install(pipe, "turbo", restore="reference")
    size = specedit.size_for(pipe, case.source)

    def call() -> Any:
        return pipe(image=case.source, prompt=case.prompt, generator=torch.Generator().manual_seed(0), **size)

    return pipe, call


def arithmetic(method: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_arithmetic(*tensors: Any) -> Any:
        return method(*tensors)

    return tensor_arithmetic


@contextmanager
def seen_arithmetic() -> Iterator[None]:
    """Inside, a profiler sees arithmetic of tensors that Python writes with its own signs."""
    import torch

    inherited = vars(torch._C.TensorBase)
    names = [name for name in ARITHMETIC if name in inherited and name not in vars(torch.Tensor)]
    try:
        for name in names:
            setattr(torch.Tensor, name, arithmetic(inherited[name]))
        yield
    finally:
        for name in names:
            delattr(torch.Tensor, name)


def is_operator(function: tuple[str, int, str]) -> bool:
    """Whether a profiled function is an operator on tensors, not Python's part of calling one."""
    file, _, name = function
    inner = ("torch._C._nn.", "torch._C.TensorBase")
    if "tensor_arithmetic" in name:  # also as which a profiler knows the C function that is called there
        return True
    return file == "~" and "torch" in name and ("torch._C." not in name or any(one in name for one in inner))


def profiled(profiler: cProfile.Profile) -> tuple[float, float, int]:
    """Seconds of all functions and of operators, and the number of calls of functions that are none."""
    stats = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    whole, operators = (sum(row[2] for key, row in stats if every or is_operator(key)) for every in (True, False))
    return whole, operators, sum(row[1] for key, row in stats if not is_operator(key))


def measure() -> list[dict[str, float]]:
    """What every measured call took: the columns of `COLUMNS`."""
    pipe, call = make_call()
    for _ in range(WARM_UP):
        call()
    transformer = type(pipe.transformer)
    forward, inner = transformer.forward, cProfile.Profile(time.thread_time)

    def seen(*args: Any, **kwargs: Any) -> Any:
        inner.enable()
        try:
            return forward(*args, **kwargs)
        finally:
            inner.disable()

    rows = []
    for _ in range(CALLS):
        start = time.thread_time()
        call()
        alone = time.thread_time() - start
        outer = cProfile.Profile(time.thread_time)
        inner.clear()
        with seen_arithmetic():
            outer.runcall(call)
            transformer.forward = seen
            call()
            transformer.forward = forward
        whole, operators, calls = profiled(outer)
        own = profiled(inner)[1]
        found = (whole - own, operators - own, whole - operators, own, alone)
        rows.append({name: 1e3 * seconds for name, seconds in zip(TIMES, found, strict=True)} | {"python_calls": calls})
    return rows


def measured_in(checkout: Path) -> list[dict[str, float]]:
    """`measure` in a process of its own, with the specedit of a checkout."""
    code = f"import sys; sys.path[:0] = [{str(checkout)!r}, {str(Path(__file__).parent)!r}]\n"
    code += "import json, call_overhead; print(json.dumps(call_overhead.measure()))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return list(json.loads(result.stdout.splitlines()[-1]))


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in COLUMNS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.call_overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes for each checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.before is not None and not (options.before / "specedit").is_dir():
        parser.error(f"--before: expected a checkout with specedit, got {options.before}")
    checkouts = {"now": Path(__file__).parents[1]}
    if options.before is not None:
        checkouts["before"] = options.before.resolve()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            found[name] += measured_in(checkout)
    rows = [{"code": name} | medians(each) for name, each in found.items()]
    for row in rows:
        print(f"{row['code']:7}" + "".join(f"{name} {row[name]:,.1f}   " for name in COLUMNS))
    if len(rows) == 2:
        print("ratio  " + "".join(f"{name} {rows[0][name] / rows[1][name]:.3f}   " for name in COLUMNS))
    if options.json:
        write(options.json, rows, options)
    return 0


def write(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A result file. before: the commit of the other checkout."""
    import torch

    from specedit.evaluation import results

    torch.set_num_threads(1)  # as in the processes that were measured
    command = f"python -m benchmarks.call_overhead --rounds {options.rounds}"
    more: dict[str, Any] = {}
    if options.before is not None:
        command += " --before CHECKOUT"
        head = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
        more["before"] = subprocess.run(head, capture_output=True, text=True).stdout.strip() or None
    results.write(path, f"{command} --json FILE", rows, **more)


if __name__ == "__main__":
    sys.exit(main())

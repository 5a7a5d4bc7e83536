"""Host time of a kernel call up to its launch, without a GPU: over benchmarks/dry_gpu, whose driver runs nothing.

    python -m benchmarks.host_time [--before CHECKOUT] [--json FILE]

With --before, another checkout's specedit_kernels is measured in alternation, and the ratio printed. Times are the
lowest of several batches of calls, in microseconds of CPU time. They say how the two compare on this machine, not what
a GPU's host will take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CALLS, BATCHES, ROUNDS = 200, 8, 3
COMMAND = "python -m benchmarks.host_time --before CHECKOUT --json benchmarks/results/host-time.json"


def calls() -> dict[str, Callable[[], object]]:
    """One call of each operator with FLUX's heads, 24 of 128 channels, and few tokens, since outputs are allocated."""
    import specedit_kernels as kernels

    bf16 = torch.bfloat16
    q = torch.zeros(1, 64, 24, 128, dtype=bf16)
    packed, bias = q[0], torch.zeros(1, 64)
    cu = torch.tensor([0, 30, 64], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "key_bias": bias[0]}
    planned: dict[str, object] = dict(lengths)  # another checkout may have no plans
    if hasattr(kernels, "plan"):
        plan = kernels.plan(cu, cu, total_q=64, total_k=64, head_dim=128, dtype=bf16, key_bias=bias[0])
        planned = {"plan": plan}
    weight, angles, rows = torch.ones(128, dtype=bf16), torch.zeros(64, 64), torch.arange(64)
    out = [torch.empty_like(q) for _ in range(3)]
    latents, stack, weights = torch.zeros(1, 64, 64, dtype=bf16), torch.zeros(3, 1, 64, 64, dtype=bf16), torch.ones(3)
    noise = torch.zeros(1, 64, 4, 16, 3)
    return {
        "attention, dense": lambda: kernels.mixed_attention(q, q, q, key_bias=bias),
        "attention, packed": lambda: kernels.mixed_attention(packed, packed, packed, **lengths),
        "attention, planned": lambda: kernels.mixed_attention(packed, packed, packed, **planned),
        "qk_norm_rope": lambda: kernels.qk_norm_rope(
            q, q, weight, weight, angles, angles, v=q, out_index=rows, out=out
        ),
        "gather_tokens": lambda: kernels.gather_tokens(latents, rows),
        "scatter_tokens": lambda: kernels.scatter_tokens(latents, rows, out[0].view(1, -1, 64)[:, :64]),
        "expand_tokens": lambda: kernels.expand_tokens(latents, 0.5, noise=noise),
        "weighted_sum": lambda: kernels.weighted_sum(stack, weights),
    }  # fmt: skip


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of the calling thread, which launches: the lowest mean of a batch of calls."""
    call()
    best = float("inf")
    for _ in range(BATCHES):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time() - start) / CALLS)
    return 1e6 * best


def measure() -> dict[str, float]:
    from benchmarks import dry_gpu

    with dry_gpu.use((9, 0)), torch.no_grad():
        return {name: microseconds(call) for name, call in calls().items()}


def measured_in(checkout: Path) -> dict[str, float]:
    """`measure` in a process of its own, with the specedit_kernels of a checkout."""
    code = f"import sys; sys.path[:0] = [{str(checkout)!r}, {str(Path(__file__).parent)!r}]\n"
    # The other checkout's dry_gpu fits its kernels; the calls are this one's.
    code += "import json, host_time; print(json.dumps(host_time.measure()))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def lowest(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    if options.before is not None and not (options.before / "benchmarks" / "dry_gpu").is_dir():
        parser.error(f"--before: expected a checkout with benchmarks/dry_gpu, got {options.before}")
    from benchmarks import dry_gpu

    if (reason := dry_gpu.missing()) is not None:
        parser.error(f"expected a machine that can build the dry driver: {reason}")
    here = Path(__file__).parents[1]
    both: dict[str, list[dict[str, float]]] = {"now": [], "before": []}
    for _ in range(ROUNDS):
        both["now"].append(measured_in(here))
        if options.before is not None:
            both["before"].append(measured_in(options.before.resolve()))
    now, before = lowest(both["now"]), lowest(both["before"]) if both["before"] else {}
    rows = [{"call": name, "us": value, "us_before": before.get(name)} for name, value in now.items()]
    for row in rows:
        old = row["us_before"]
        print(
            f"{row['call']:20} {row['us']:7.1f} us" + (f"   {old:7.1f} before, {old / row['us']:.2f}x" if old else "")
        )
    if options.json:
        options.json.write_text(
            json.dumps({"machine": {"torch": torch.__version__}, "command": COMMAND, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

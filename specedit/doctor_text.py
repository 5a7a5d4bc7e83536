"""The report of `specedit doctor` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHAPES = {"stock": "stock call", "mixed": "mixed, 20 % edited", "packed": "packed, two prompts"}
PROVIDERS = {"triton": "Triton kernel", "merged": "merged passes", "torch": "PyTorch"}


def text(report: dict[str, Any]) -> str:
    """All of it, a paragraph for each part."""
    parts = (_versions(report), _machine(report), _checks(report), _timings(report), _auto(report), _end(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _versions(report: dict[str, Any]) -> Iterator[str]:
    known = {name: version or "none" for name, version in report["versions"].items()}
    yield f"specedit {known.pop('specedit')}, python {known.pop('python')}, {known.pop('system')}"
    yield ", ".join(f"{name} {version}" for name, version in known.items())


def _machine(report: dict[str, Any]) -> Iterator[str]:
    machine, kernels = report["machine"], report["kernels"]
    if machine["gpu"] is None:
        yield "GPU       none"
    else:
        memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.0f} GiB"
        capability = ".".join(map(str, machine["capability"]))
        yield f"GPU       {machine['gpu']}{memory}, compute capability {capability}, driver {machine['driver']}"
    yield f"CPU       {machine['cpu']}, {machine['threads']} threads"
    yield f"compiler  {machine['compiler'] or 'none'}"
    if kernels["run"]:
        yield f"kernels   run, with launch parameters of {kernels['launch_parameters']}"
    else:
        yield f"kernels   do not run: {kernels['why']}"


def _checks(report: dict[str, Any]) -> Iterator[str]:
    yield "Checked against PyTorch in float64 (errors are shares of the largest value):"
    checks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in report["checks"]:
        checks.setdefault((one["where"], one["kernel"]), []).append(one)
    for (where, kernel), cases in checks.items():
        errors = [one["error"] for one in cases if one["error"] is not None]
        worst = f"largest error {max(errors):.1e}" if errors else "did not run"
        failed = [one for one in cases if not one["passed"]]
        yield f"  {where:12}{kernel:17}{len(cases) - len(failed):>3} of {len(cases):>2} cases right, {worst}"
        for one in failed:
            yield f"    WRONG     {one['said']}"
    why, places = report["kernels"]["interpreter"], {one["where"] for one in report["checks"]}
    if why is not None and "GPU" not in places:
        yield f"  the kernels were not {'all ' * ('interpreter' in places)}checked: {why}"


def _timings(report: dict[str, Any]) -> Iterator[str]:
    timings = report["timings"]
    first = timings[0]
    size = "at full size" if report["machine"]["gpu"] is not None and first["heads"] > 2 else "at a small size"
    yield f"Attention {size}, {first['heads']} heads of {first['dim']}, {first['dtype']}, milliseconds of a call:"
    names = list(dict.fromkeys(one["provider"] for one in timings))
    yield " " * 36 + "".join(f"{PROVIDERS[name]:>16}" for name in names)
    for shape, label in SHAPES.items():
        row = {one["provider"]: one for one in timings if one["shape"] == shape}
        tokens = " + ".join(map(str, row[names[0]]["tokens"]))
        cells = ("-" if row[name]["ms"] is None else f"{row[name]['ms']:.3f}" for name in names)
        yield f"  {label:21}{tokens:>13}" + "".join(f"{cell:>16}" for cell in cells)
    for one in timings:
        if one["why"] is not None:
            yield f"  {one['shape']}, {PROVIDERS[one['provider']]}: {one['why']}"


def _auto(report: dict[str, Any]) -> Iterator[str]:
    auto = report["auto"]
    yield f'attention="auto" takes "{auto["attention"]}" for mixed stages: {auto["why"]}.'
    yield f'Other kernels: "{auto["others"]}".'
    yield from (f"Advice: {line}." for line in report["advice"])


def _end(report: dict[str, Any]) -> Iterator[str]:
    problems = report["problems"]
    if problems:
        yield f"{len(problems)} of {len(report['checks'])} checks are wrong. Please report it."
    else:
        yield "Everything that was checked is right."
    yield "To a bug report attach what `specedit doctor --json` prints, and the output with SPECEDIT_TRACEBACK=1."

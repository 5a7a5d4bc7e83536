"""Joins result files of `benchmarks.scores` that were made side by side.

    python -m benchmarks.merge A.json B.json --out C.json

Variants and tasks are united. Files of another editor, size or version are refused as by --resume. A task that a
variant has in both must have equal scores, within what rounding may change; those of the first file are kept, and its
seconds. Machines of different files count as different, even if they are of one kind, so clock ratios come from the
tasks that a variant and its baseline have in the same file. --one-machine says that the files are of one machine, whose
seconds can be compared. --part of the commands divides a table that way.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.result_file import Content, difference, position, read, summary, without, write

OF_FILE = ("machine", "machines", "command", "rows")  # the other fields of a file must agree
ROUNDED = ("edit_psnr", "keep_psnr", "seam", "texture_")  # how scores begin that pictures' last bits change
ROUNDING = 1e-3  # relative; even one processor does not add in the same order in every process
SCORED = ("mean", "kinds", "cases", "nfe", "cached_steps", "cache_bytes")  # likewise of a row


def merged(first: Content, second: Content) -> Content:
    """Both files' scores, as `read` returns them; the fields of the first are used up.

    Raises:
        ValueError: the files hold scores of something else, or differ in a variant's settings or scores.
    """
    if reason := difference(first, second):
        raise ValueError(reason)
    _agree("the file", without(first, *OF_FILE), without(second, *OF_FILE))
    rows = {row["variant"]: row for row in first["rows"]}
    for row in second["rows"]:
        moved = [case | {"machine": case["machine"] + len(first["machines"])} for case in row["cases"]]
        held = rows.setdefault(row["variant"], row | {"cases": []})
        _agree(row["variant"], without(held, *SCORED), without(row, *SCORED))
        held["cases"] = _united(row["variant"], held["cases"], moved)
        held |= summary(held["cases"])
        if "cache_bytes" in row:
            held["cache_bytes"] = max(held.get("cache_bytes") or 0, row["cache_bytes"] or 0)
    commands = dict.fromkeys((first["command"], second["command"]))
    latest = max((first["machine"], second["machine"]), key=lambda machine: machine["date"])
    result = first | {"machine": latest, "command": "; ".join(commands), "rows": list(rows.values())}
    return _renumbered(result | {"machines": first["machines"] + second["machines"]})


def _united(variant: str, cases: list[Content], more: list[Content]) -> list[Content]:
    """The tasks of both by their seed, the first's where both have one."""
    seeds = {case["seed"]: case for case in cases}
    for case in more:
        held = seeds.setdefault(case["seed"], case)
        _agree(f"{variant}, task {case['seed']}", *(without(one, "seconds", "machine") for one in (held, case)))
    return [seeds[seed] for seed in sorted(seeds)]


def _agree(what: str, expected: Content, got: Content) -> None:
    names = [name for name in expected | got if not _alike(name, expected.get(name), got.get(name))]
    if names:
        wanted, found = ({name: one.get(name) for name in names} for one in (expected, got))
        raise ValueError(f"{what}: expected {wanted}, got {found}")


def _alike(name: str, expected: Any, got: Any) -> bool:
    if [expected] == [got]:  # lists compare by identity first: `read` has one nan
        return True
    rounded = name.startswith(ROUNDED) and isinstance(expected, float) and isinstance(got, float)
    return rounded and math.isclose(expected, got, rel_tol=ROUNDING)


def _renumbered(content: Content) -> Content:
    """The content without machines that have no tasks."""
    cases = [case for row in content["rows"] for case in row["cases"]]
    used = sorted({case["machine"] for case in cases})
    for case in cases:
        case["machine"] = used.index(case["machine"])
    return content | {"machines": [content["machines"][i] for i in used]}


def on_one_machine(content: Content) -> Content:
    """The content with all tasks on its latest machine.

    Raises:
        ValueError: it has machines of several kinds.
    """
    machine = content["machine"]
    if odd := [other for other in content["machines"] if position(other, [machine])]:
        raise ValueError(f"expected one kind of machine, got {machine} and {odd[0]}")
    for row in content["rows"]:
        row["cases"] = [case | {"machine": 0} for case in row["cases"]]
        row |= summary(row["cases"])
    return content | {"machines": [machine]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("others", nargs="+", type=Path, metavar="other")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one-machine", action="store_true", help="one machine wrote all files")
    args = parser.parse_args(arguments)
    content = read(args.first)
    for path in args.others:
        try:
            content = merged(content, read(path))
        except ValueError as error:
            raise SystemExit(f"merge: {path}: {error}") from None
    if args.one_machine:
        try:
            content = on_one_machine(content)
        except ValueError as error:
            raise SystemExit(f"merge: --one-machine: {error}") from None
    write(args.out, content)


if __name__ == "__main__":
    main()

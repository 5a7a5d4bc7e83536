"""Result files of many tasks: which tasks are compared, and which seconds."""

import math
from collections import Counter
from typing import NamedTuple

from docs_results import load, machines, where

ENOUGH = 0.5  # of the fullest row's tasks
MOST = 0.75  # likewise, where rows with fewer have a table of their own


def average(cases: list[dict], key: str) -> float | None:
    """Mean over the cases that have `key`: a task that changes everything has no keep dB. None if no case has it."""
    values = [case[key] for case in cases if case.get(key) is not None]
    return sum(values) / len(values) if values else None


def compared(name: str, enough: float = ENOUGH) -> dict | None:
    """The file with its rows over the tasks that all of them have run; None without a file.

    `note` has sentences for below the table, where some rows have run fewer tasks than others. enough: as in `shared`.
    """
    result = load(name)
    if result is None:
        return None
    rows, left_out = shared(result["rows"], enough)
    count, notes = len(rows[0]["cases"]), []
    if any(len(row["cases"]) > count for row in result["rows"]):
        notes.append(f"Rows are compared on the {count} tasks that all of them have run.")
    if left_out:
        notes.append(f"Not run on enough tasks to compare: {', '.join(left_out)}.")
    return result | dict(rows=rows, note=" ".join(notes))


def shared(rows: list[dict], enough: float = ENOUGH) -> tuple[list[dict], list[str]]:
    """The rows over the tasks that all of them have, and the names of those left out.

    A row is left out if with it less than `enough` of the fullest row's textures, or of its other tasks, are shared, or
    no task at all.
    """
    seeds_of = {row["variant"]: {case["seed"] for case in row["cases"]} for row in rows}
    textures = {case["seed"] for row in rows for case in row["cases"] if case["kind"] == "texture"}
    seeds = fullest = max(seeds_of.values(), key=len)
    left_out = []
    for name in sorted(seeds_of, key=lambda name: -len(seeds_of[name])):
        both = seeds & seeds_of[name]
        pairs = ((both & textures, fullest & textures), (both - textures, fullest - textures))
        if (fullest and not both) or any(len(some) < enough * len(most) for some, most in pairs):
            left_out.append(name)
        else:
            seeds = both
    return [_over(row, seeds) for row in rows if row["variant"] not in left_out], left_out


def _over(row: dict, seeds: set[int]) -> dict:
    """The row with only some of its tasks, and their means; mean seconds are of `seconds` alone."""
    cases = [case for case in row["cases"] if case["seed"] in seeds]
    if len(cases) == len(row["cases"]):
        return row
    kinds = {kind: _means([case for case in cases if case["kind"] == kind]) for kind in row["kinds"]}
    kinds = {kind: mean for kind, mean in kinds.items() if mean["count"]}
    return row | dict(cases=cases, mean=_means(cases), kinds=kinds)


def _means(cases: list[dict]) -> dict:
    keys = dict.fromkeys(key for case in cases for key in case if key not in ("seed", "kind", "seconds", "machine"))
    return {"count": len(cases)} | {key: average(cases, key) for key in keys}


def clock_ratio(baseline: list[dict], cases: list[dict]) -> float | None:
    """How many times more seconds the baseline took; None if no machine timed a task of both.

    Seconds are compared within a machine: the sums over the tasks that it timed of both. The machines' ratios are
    combined by a geometric mean, weighted by these tasks. A ratio of sums over machines would be that of the slowest
    machine, and would compare machines where these have different tasks. An arithmetic mean of ratios would depend on
    which of the two is the baseline.
    """
    theirs, own = ({(case.get("machine", 0), case["seed"]): case.get("seconds") for case in some}
                   for some in (baseline, cases))  # fmt: skip
    pairs: dict[int, list[tuple[float, float]]] = {}
    for key, seconds in own.items():
        if seconds and theirs.get(key):
            pairs.setdefault(key[0], []).append((theirs[key], seconds))
    if not pairs:
        return None
    sums = [(len(timed), *map(sum, zip(*timed))) for timed in pairs.values()]
    logs = sum(count * math.log(slow / fast) for count, slow, fast in sums)
    return math.exp(logs / sum(count for count, *_ in sums))


class Timing(NamedTuple):
    """Mean seconds by variant, of how many tasks, and ", on MACHINE" if the file has several."""

    seconds: dict[str, float | None]
    tasks: int
    machine: str


def mean_seconds(result: dict, enough: float = ENOUGH) -> Timing:
    """Of the machine that timed most, over the tasks of `shared` there; the rows that it leaves out are missing."""
    timed = Counter(case.get("machine", 0) for row in result["rows"] for case in row["cases"] if case.get("seconds"))
    if not timed:
        return Timing({}, 0, "")
    machine = timed.most_common(1)[0][0]
    rows = [
        row | dict(cases=[case for case in row["cases"] if case.get("seconds") and case.get("machine", 0) == machine])
        for row in result["rows"]
    ]
    every = machines(result)
    rows, _ = shared(rows, enough)
    means = {row["variant"]: average(row["cases"], "seconds") for row in rows}
    return Timing(means, len(rows[0]["cases"]), f", on {where(every[machine])}" if len(every) > 1 else "")

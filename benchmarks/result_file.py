"""Reads and writes the files of `benchmarks.scores`, whose tasks may have run on several machines.

`machine` is the latest that ran tasks. A file of several lists them all in `machines`, and each of its cases has the
index of its own, `machine`. Success, distances and FLOPs do not depend on it, seconds do: a row whose tasks were timed
on several has no mean of them, because it would be no machine's. A run tells machines apart by GPU, CPU, threads and
versions, so that two of one kind count as one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from specedit import micro
from specedit.evaluation import results

Content = dict[str, Any]
VERSIONS = ("torch", "diffusers")  # another major or minor version may give other pictures


def without(content: Content, *names: str) -> Content:
    """The content, or a part of it, without some fields."""
    return {name: value for name, value in content.items() if name not in names}


def read(path: Path) -> Content:
    """The file, with `machines` and every case's `machine` also where there is one; null becomes nan."""
    content = json.loads(path.read_text())
    content.setdefault("machines", [content["machine"]])
    for row in content["rows"]:
        row["cases"] = [{name: math.nan if value is None else value for name, value in c.items()} for c in row["cases"]]
        for case in row["cases"]:
            case.setdefault("machine", 0)
    return content


def write(path: Path, content: Content) -> None:
    """The reverse of `read`."""
    more = without(content, "command", "rows")
    rows = content["rows"]
    if len(content["machines"]) < 2:
        del more["machines"]
        rows = [row | {"cases": [without(case, "machine") for case in row["cases"]]} for row in rows]
    results.write(path, content["command"], rows, **more)


def difference(here: Content, there: Content) -> str | None:
    """Why the scores of `there` may not join those of `here`, or None: another subject, or other versions."""
    for expected, got in ((here["of"], there.get("of")), (_versions(here), _versions(there))):
        if expected != got:
            return f"holds scores of {got}, expected {expected}"
    return None


def position(machine: Content, machines: list[Content]) -> int:
    """The index of the last of `machines` with the same description; the next free one if there is none."""
    kind = without(machine, "commit", "date")
    alike = [i for i, other in enumerate(machines) if without(other, "commit", "date") == kind]
    return alike[-1] if alike else len(machines)


def summary(cases: list[Content]) -> Content:
    """`micro.summary`, with nan as the mean seconds of several machines."""
    timed_on = {case["machine"] for case in cases if not math.isnan(case.get("seconds", math.nan))}
    lost = {"seconds": math.nan} if len(timed_on) > 1 else {}
    return micro.summary([without(case, "machine") | lost for case in cases])


def _versions(content: Content) -> dict[str, str]:
    """Major and minor versions."""
    return {name: ".".join(content["machine"][name].split(".")[:2]) for name in VERSIONS}

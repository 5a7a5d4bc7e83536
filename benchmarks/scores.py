"""A results file of many tasks under many variants, written as they are scored.

The variants take turns every few tasks, so that a machine whose speed drifts is as slow for one as for another. A run
that was stopped, or that is to see more tasks than before, goes on where the file ends. It refuses to mix scores of
other weights, of another size or from another machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from specedit import micro, results
from specedit.install import last_report

EVERY = 4  # tasks of one variant before it is the next one's turn


def fingerprint(path: Path | None) -> str | None:
    """First 12 hexadecimal digits of the SHA-256 of a file, or of a folder's .safetensors files; None without it."""
    if path is None or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Scores:
    """The rows of one file: `variant`, its own fields, `mean`, `kinds`, and `cases`, one entry a task."""

    def __init__(
        self, path: Path, command: str, cases: list[micro.scenes.Case], of: dict[str, Any], resume: bool, **more: Any
    ):
        """`of`: what is scored (editor, size, weights); with `resume` the file's own has to be the same.

        Raises:
            SystemExit: the file holds scores of something else.
        """
        self.path, self.command, self.cases, self.more = path, command, cases, {"of": of, **more}
        self.rows: list[dict[str, Any]] = []
        if resume and path.exists():
            old = json.loads(path.read_text())
            here, there = (
                {k: v for k, v in machine.items() if k not in ("commit", "date")}
                for machine in (results.machine(), old["machine"])
            )
            for expected, got in ((of, old.get("of")), (here, there)):
                if expected != got:
                    raise SystemExit(f"--resume: {path} holds scores of {got}, expected {expected}; give another --out")
            self.rows = old["rows"]
            for row in self.rows:
                row["cases"] = [{k: math.nan if v is None else v for k, v in case.items()} for case in row["cases"]]

    def lacks(self, variant: str) -> list[micro.scenes.Case]:
        """The tasks that `variant` has not seen."""
        seen = {case["seed"] for row in self.rows if row["variant"] == variant for case in row["cases"]}
        return [case for case in self.cases if case.seed not in seen]

    def turns(self, variants: Iterable[str]) -> Iterator[tuple[str, list[micro.scenes.Case]]]:
        """Each variant in turn with the next `EVERY` tasks, those that it lacks, until none lacks any; then tell."""
        lacking = {variant: {case.seed for case in self.lacks(variant)} for variant in variants}
        with tqdm(total=sum(map(len, lacking.values()))) as bar:
            for start in range(0, len(self.cases), EVERY):
                part = self.cases[start : start + EVERY]
                for variant, seeds in lacking.items():
                    if todo := [case for case in part if case.seed in seeds]:
                        bar.set_description(variant)
                        yield variant, todo
                        bar.update(len(todo))
        for row in self.rows:
            if lacking.get(row["variant"]):
                mean = row["mean"]
                print(
                    f"{row['variant']}: success {mean['success']:.1%}, edit {mean['edit_psnr']:.1f} dB, "
                    f"keep {mean['keep_psnr']:.1f} dB, {mean['flops'] / 1e12:.3f} TFLOPs"
                )

    def score(
        self,
        pipe: Any,
        variant: str,
        cases: list[micro.scenes.Case],
        num_inference_steps: int | None,
        **fields: Any,
    ) -> None:
        """Run `cases`, which `variant` lacks, and write the file. `fields` go into the variant's row."""
        self.add(pipe, variant, micro.evaluate(pipe, cases, num_inference_steps)["cases"], **fields)

    def add(self, pipe: Any, variant: str, scored: list[dict[str, Any]], **fields: Any) -> None:
        """Put what `pipe` has just scored, as `micro.evaluate` returns it in "cases", into the file."""
        row = next((row for row in self.rows if row["variant"] == variant), None)
        if row is None:
            row = dict(variant=variant, **fields, mean={}, kinds={}, cases=[])
            self.rows.append(row)
        row["cases"] += scored
        row |= micro.summary(row["cases"])
        if (last := last_report(pipe)) is not None:
            row |= dict(nfe=last.nfe, cached_steps=last.cached_steps, cache_bytes=last.cache_bytes)
        results.write(self.path, self.command, self.rows, **self.more)

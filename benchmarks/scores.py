"""A results file of many tasks under many variants, written as they are scored.

The variants take turns every few tasks, so that a machine whose speed drifts is as slow for one as for another. A run
that was stopped, or that is to see more tasks than before, goes on where the file ends, also on another machine
(`benchmarks.result_file`). It refuses to mix scores of other weights, of another size or under other versions of torch
or diffusers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks import result_file
from specedit import micro, uninstall
from specedit.api.installing import install, last_report
from specedit.evaluation import results
from specedit.micro import evaluation
from specedit.micro.loading import identity
from specedit.pipelines import EDITORS

EVERY = 4  # tasks of one variant per turn


def options(
    about: str | None, cases: int = 64, models: Sequence[str] = EDITORS, textures: bool = True
) -> argparse.ArgumentParser:
    """The common options; `about`: the docstring of the module that adds its own. `textures`: add --textures."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--model", default=models[0], choices=models, help="the embedded editor")
    parser.add_argument("--cases", type=int, default=cases)
    if textures:
        parser.add_argument("--textures", type=int, help="how many textures besides, default a quarter of --cases")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="go on with the file, also on another machine")
    parser.add_argument("--part", type=part, default=slice(None), metavar="K/N", help="every N-th turn, from the K-th")
    parser.add_argument("--no-clock", dest="clock", action="store_false", help="no seconds: for a machine that is busy")
    return parser


def part(text: str) -> slice:
    """Which turns of `EVERY` tasks are the K-th of N parts, to be made side by side and merged; "K/N" from 1."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, got {text}")
    return slice(int(first) - 1, None, int(count))


def command(module: str, args: argparse.Namespace) -> str:
    """The command for the file, without --out, --only, --part and --no-clock, which the file shows."""
    words = f"python -m benchmarks.{module} --model {args.model} --cases {args.cases}"
    textures = getattr(args, "textures", None)
    return words + ("" if textures is None else f" --textures {textures}") + f" --size {args.size}"


def tasks(args: argparse.Namespace, first: int = 0) -> list[micro.scenes.Case]:
    """The tasks of a table: `--cases` with one right answer, of seeds from `first`, then `--textures`.

    Textures are the scenes of `micro.texture_cases` from the same `first`.
    """
    return list(evaluation.tasks(args.cases, evaluation.textures_beside(args.cases, args.textures), args.size, first))


def in_words(mean: dict[str, float]) -> str:
    """The means of a variant's scores on one line, without those that it has no tasks for."""
    shown = (
        ("success", "success {:.1%}"), ("edit_psnr", "edit {:.1f} dB"), ("texture_distance", "texture {:.2f}"),
        ("material", "material {:.1%}"), ("keep_psnr", "keep {:.1f} dB"),
    )  # fmt: skip
    words = [form.format(mean[name]) for name, form in shown if not math.isnan(mean.get(name, math.nan))]
    return ", ".join([*words, f"{mean['flops'] / 1e12:.3f} TFLOPs"])


def whose(args: argparse.Namespace) -> dict[str, Any]:
    """Editor, weights and size of a file's scores."""
    return identity(args.model) | dict(size=args.size)


def some(every: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The entries of `every` with these names; None: all.

    Raises:
        SystemExit: an unknown name.
    """
    if unknown := set(names or ()) - set(every):
        raise SystemExit(f"--only: expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    return every if names is None else {name: every[name] for name in names}


def editor(model: str) -> Any:
    """The embedded editor, on a GPU if there is one, without progress bars."""
    pipe = micro.load(model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def why_unfit(pipe: Any, config: str | None = None, **fields: Any) -> str | None:
    """Why this editor cannot run a configuration, which may need trained weights, or None. Nothing stays installed."""
    try:
        install(pipe, config, **fields)
    except (TypeError, ValueError, FileNotFoundError) as error:
        return str(error)
    finally:
        uninstall(pipe)
    return None


def fitting(
    chosen: dict[str, dict[str, Any]], why_not: Callable[[dict[str, Any]], str | None], named: bool = False
) -> dict[str, dict[str, Any]]:
    """The variants without those that have a reason not to run, which are printed with it, before any work.

    Raises:
        SystemExit: one that cannot run was asked for by its name (`named`).
    """
    reasons = {name: reason for name, settings in chosen.items() if (reason := why_not(settings)) is not None}
    for name, reason in reasons.items():
        if named:
            raise SystemExit(f"--only: {name!r} does not fit this editor: {reason}")
        print(f"{name}: left out: {reason}")
    return {name: settings for name, settings in chosen.items() if name not in reasons}


class Scores:
    """The rows of one file: `variant`, its fields, `mean`, `kinds`, and `cases`, one entry per task."""

    def __init__(
        self,
        path: Path,
        command: str,
        cases: list[micro.scenes.Case],
        of: dict[str, Any],
        resume: bool,
        clock: bool = True,
        part: slice = slice(None),
        **more: Any,
    ):
        """`of`: what is scored (editor, size, weights); with `resume`, the file's must be the same. `more`: its fields.

        clock: whether seconds are kept. part: of the turns, those that are taken.

        Raises:
            SystemExit: the file holds scores of something else, or under other versions.
        """
        turns = [cases[start : start + EVERY] for start in range(0, len(cases), EVERY)]
        self.path, self.cases, self.clock = path, [case for turn in turns[part] for case in turn], clock
        here = results.machine()
        self.content: result_file.Content = {
            "machine": here,
            "command": command,
            "machines": [],
            "of": of,
            **more,
            "rows": [],
        }
        if resume and path.exists():
            old = result_file.read(path)
            if reason := result_file.difference(self.content, old):
                raise SystemExit(f"--resume: {path} {reason}; give another --out")
            self.content |= {name: old[name] for name in ("machine", "machines", "rows")}
        self.rows: list[dict[str, Any]] = self.content["rows"]
        self.at = result_file.position(here, self.content["machines"])

    @classmethod
    def asked(
        cls,
        module: str,
        args: argparse.Namespace,
        cases: list[micro.scenes.Case],
        of: dict[str, Any] | None = None,
        switches: str = "",
        **more: Any,
    ) -> Scores:
        """The file that `args`, read by `options`, ask `module` for.

        of: what is scored besides editor, weights and size. switches: the module's own, as a command has them.
        """
        words = command(module, args) + switches
        return cls(args.out, words, cases, whose(args) | (of or {}), args.resume, args.clock, args.part, **more)

    def lacks(self, variant: str) -> list[micro.scenes.Case]:
        """The tasks that `variant` has not run."""
        seen = {case["seed"] for row in self.rows if row["variant"] == variant for case in row["cases"]}
        return [case for case in self.cases if case.seed not in seen]

    def turns(self, variants: Iterable[str]) -> Iterator[tuple[str, list[micro.scenes.Case]]]:
        """Variants in turns of the next `EVERY` tasks that they have not run; print a summary at the end."""
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
                print(f"{row['variant']}: {in_words(row['mean'])}")

    def score(
        self,
        pipe: Any,
        variant: str,
        cases: list[micro.scenes.Case],
        num_inference_steps: int | None,
        **fields: Any,
    ) -> None:
        """Run `cases` of `variant` and write the file. `fields` go into the variant's row."""
        self.add(pipe, variant, micro.evaluate(pipe, cases, num_inference_steps)["cases"], **fields)

    def add(self, pipe: Any, variant: str, scored: list[dict[str, Any]], **fields: Any) -> None:
        """Add `scored`, the "cases" of `micro.evaluate`, to the file."""
        row = next((row for row in self.rows if row["variant"] == variant), None)
        if row is None:
            row = dict(variant=variant, **fields, mean={}, kinds={}, cases=[])
            self.rows.append(row)
        self.content["machine"] = results.machine()
        self.content["machines"][self.at : self.at + 1] = [self.content["machine"]]  # new, or with the new date
        untimed = {} if self.clock else {"seconds": math.nan}
        row["cases"] += [case | untimed | {"machine": self.at} for case in scored]
        row |= result_file.summary(row["cases"])
        if (last := last_report(pipe)) is not None:
            most = max(row.get("cache_bytes") or 0, last.cache_bytes)  # a task without an edited cell keeps nothing
            row |= dict(nfe=last.nfe, cached_steps=last.cached_steps, cache_bytes=most)
        self.write()

    def write(self) -> None:
        """Write the file, as after every turn."""
        result_file.write(self.path, self.content)

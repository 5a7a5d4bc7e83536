"""`specedit batch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..config import CHOICES, DEFAULT_PRESET, presets
from ..field_checks import MAX_SCORE
from ..pipelines import EDITORS, loading
from .bounds import check_numbers, seed_number
from .errors import CLIError
from .shared import add_guidance, add_offload, silence_libraries

ROWS_FAILED = 3  # exit code
LISTED = 20  # row errors that are printed; the results file has all
SETTINGS = (
    "preset",
    "steps",
    "threshold",
    "size",
    "restore",
    "keep_pixels",
    "seed",
    "negative_prompt",
    "true_cfg_scale",
)


def add(commands) -> None:
    parser = commands.add_parser(
        "batch",
        help="edit many pictures: a folder, a JSONL or a Parquet file of rows",
        epilog="A row has the columns image and prompt, and may have mask, id, out, settings (an object), and any "
        "option below or field of SpecEditConfig by name, which then counts for that row. To resume, run the same "
        f"command again. Exit code {ROWS_FAILED} if rows failed.",
    )
    parser.add_argument("source", type=Path, help="folder of pictures, or a file of rows: .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and results.parquet")
    parser.add_argument("--prompt", help="for rows without their own")
    parser.add_argument("--model", help=f"hub id, directory, or {', '.join(EDITORS)} (default: {EDITORS[0]})")
    add_offload(parser)
    add_guidance(parser)
    parser.add_argument("--preset", choices=list(presets), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--steps", type=int, metavar="N", help="model evaluations, in the preset's proportions")
    parser.add_argument("--threshold", type=float, metavar="T", help=f"0 to {MAX_SCORE:g}; lower edits more")
    parser.add_argument("--size", type=int, metavar="N", help="edit at N pixels on the longer side at most")
    parser.add_argument("--restore", choices=CHOICES["restore"])
    parser.add_argument("--keep-pixels", action="store_true", default=None, help="outside the edit, the input's pixels")
    parser.add_argument("--seed", type=seed_number)
    parser.add_argument("--overwrite", action="store_true", help="replace results of other rows or settings in --out")
    dry = parser.add_argument_group("prediction")
    dry.add_argument("--dry-run", action="store_true", help="check all rows and predict FLOPs and time; write nothing")
    dry.add_argument("--gpu", help="predict for an A100, H100, H200 or B200 (default: this machine)")
    dry.add_argument("--edited", type=float, metavar="PERCENT", help="share edited where no mask says it, default 20")
    ray = parser.add_argument_group("Ray Data")
    ray.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help='on Ray here, or on a cluster: "auto", '
                     "host:port")  # fmt: skip
    ray.add_argument("--actors", type=int, metavar="N", help="pipelines (default: one a GPU, else one a CPU share)")
    ray.add_argument("--cpus", type=int, metavar="N", help="CPU cores of each actor, default 1")
    parser.set_defaults(run=run)


def run(args) -> int:
    _check(args)
    from ..batch import planning, results, sources
    from ..batch.jobs import Rules

    records, base = sources.read(args.source)
    asked = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    folder = results.Folder(args.out)
    plan = planning.plan(
        args.source, records, Rules(args.model, args.prompt, asked, base), folder, overwrite=args.overwrite
    )
    for note in plan.notes:
        print(f"specedit: {note}", file=sys.stderr)
    done = f", {len(plan.kept)} of them done before" if plan.kept else ""
    print(f"{plan.rows} rows{done}, {len(plan.failed)} with errors")
    if args.dry_run:
        return _ended(plan.failed + _predict(args, plan), args)
    summary = _edit(args, plan, folder)
    print(f"edited {summary.edited}, wrote {folder.path / results.FILE}")
    return _ended(summary.failed, args)


def _check(args) -> None:
    """Check options that need neither rows nor a pipeline."""
    from ..batch import settings

    for name in ("actors", "cpus"):
        if args.ray is None and getattr(args, name) is not None:
            raise CLIError(f"--{name}: expected --ray with it, got none")
    for name in ("gpu", "edited"):
        if not args.dry_run and getattr(args, name) is not None:
            raise CLIError(f"--{name}: expected --dry-run with it, got none")
    check_numbers(
        args, steps=settings.STEPS, size=settings.SIDES, threshold=(0, MAX_SCORE), true_cfg_scale=settings.SCALE,
        edited=(0, 100), actors=(1, 100_000), cpus=(1, 1024),
    )  # fmt: skip
    settings.check({name: value for name in SETTINGS if (value := getattr(args, name)) is not None})
    if args.prompt is not None and not args.prompt.strip():
        raise CLIError("--prompt: expected what to change, got an empty text")
    if args.model is not None and args.model not in EDITORS:
        silence_libraries()
        loading.check_model(args.model, EDITORS)
        loading.check_supported(args.model)
    if args.ray is not None:
        from ..integrations import ray

        ray.import_ray()


def _edit(args, plan: Any, folder: Any) -> Any:
    """Run what is to do, with a progress bar."""
    from tqdm.auto import tqdm

    from ..batch import running

    silence_libraries()
    with tqdm(total=len(plan.todo), desc="batch", unit="row", disable=not plan.todo) as bar:
        try:
            return running.run(plan, folder, _edits(args, plan, folder), show=lambda result: bar.update())
        except KeyboardInterrupt:
            print(f"specedit: {bar.n} of {bar.total} rows ran; run the same command again to resume", file=sys.stderr)
            raise


def _edits(args, plan: Any, folder: Any) -> Any:
    from ..batch import running
    from ..batch.worker import Worker
    from ..integrations.ray import Cluster

    if args.ray is not None:
        cluster = Cluster(args.ray, args.actors, args.cpus or 1)
        return cluster.edits(args.model, folder.path, offload=args.offload)
    worker = Worker(args.model, folder.path, offload=args.offload) if plan.todo else None
    return running.one_process(worker)


def _predict(args, plan: Any) -> list[Any]:
    """Print what the rows would take; results of rows whose masks cannot be used."""
    silence_libraries()
    from ..batch import prediction

    rate = None if args.gpu else prediction.rate_here()
    edited = (20.0 if args.edited is None else args.edited) / 100
    groups, failed = prediction.predict(
        plan.todo, prediction.cost_of(args.model), edited=edited, gpu=args.gpu, rate=rate
    )
    print(f"\n{'rows':>8}{'size':>13}  {'preset':24}{'edited':>7}{'NFE':>5}{'TFLOPs':>10}{'ratio':>7}{'seconds':>10}")
    for group in groups:
        size = f"{group.size[0]} x {group.size[1]}"
        print(
            f"{group.rows:8,}{size:>13}  {group.config.name:24}{group.edited:7.0%}{group.config.nfe:5}"
            f"{_number(group.flops / 1e12):>10}{group.flops_ratio:6.2f}x{_number(group.seconds):>10}"
        )
    flops, seconds = (sum(group.rows * getattr(group, name) for group in groups) for name in ("flops", "seconds"))
    where = args.gpu or f"this machine, whose matrix products run at {rate / 1e9:,.0f} GFLOP/s"
    print(f"\nin all {_number(flops / 1e12)} TFLOPs; at least {_duration(seconds)} on one worker, for {where}")
    if args.actors:
        print(f"at least {_duration(seconds / args.actors)} on {args.actors} actors")
    return failed


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{_number(seconds)} seconds"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ended(failed: list[Any], args) -> int:
    """List the rows that failed; the exit code."""
    for result in failed[:LISTED]:
        print(f"specedit: {result.id}: {result.error}", file=sys.stderr)
    if len(failed) > LISTED:
        print(f"specedit: and {len(failed) - LISTED} more", file=sys.stderr)
    if failed:
        again = "" if args.dry_run else "; run the command again to try only these"
        print(f"specedit: {len(failed)} rows failed{again}", file=sys.stderr)
    return ROWS_FAILED if failed else 0

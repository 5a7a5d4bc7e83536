"""`specedit bench`."""

from __future__ import annotations

from pathlib import Path

from ..pipelines import EDITORS
from . import plan
from .shared import Failure, add_model, attention_here, check_size, quiet


def add(commands) -> None:
    parser = commands.add_parser(
        "bench", help="time quality, balanced, fast and turbo, with both restores, against stock on this machine"
    )
    add_model(parser)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1, help="timed calls of each; the median counts")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=run)
    plan.add(parser.add_subparsers(metavar="plan"))


def run(args) -> int:
    if args.repeat < 1:
        raise Failure(f"--repeat: expected at least 1, got {args.repeat}")
    check_size(args.size, 64)
    quiet()
    from .. import bench, results
    from ..micro.loading import identity

    rows = bench.presets_against_stock(args.size, args.repeat, model=args.model, **attention_here())
    print(f"{'preset':14}{'restore':11}{'edited':>8}{'seconds':>9}{'speedup':>9}{'FLOPs ratio':>13}{'quotient':>10}")
    for row in rows:
        quotient = row["speedup"] / row["flops_ratio"]
        print(
            f"{row['preset']:14}{row['restore']:11}{row['edit_fraction']:8.0%}{row['seconds']:9.2f}"
            f"{row['speedup']:8.2f}x{row['flops_ratio']:12.2f}x{quotient:10.2f}"
        )
    if args.json is not None:
        named = "" if args.model == EDITORS[0] else f" --model {args.model}"
        results.write(
            args.json, f"specedit bench{named} --size {args.size} --repeat {args.repeat}", rows, of=identity(args.model)
        )
    return 0

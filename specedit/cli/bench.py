"""`specedit bench`."""

from __future__ import annotations

from pathlib import Path

from ..config import STOCK_STEPS
from ..io.files import check_writable
from ..pipelines import EDITORS
from . import plan
from .bounds import LARGEST_EMBEDDED, check_numbers, check_size
from .shared import add_model, attention_here, silence_libraries

REPEAT = 3  # the time of a single call is mostly noise


def add(commands) -> None:
    parser = commands.add_parser(
        "bench", help="time quality, balanced, fast and turbo, with both restores, against stock on this machine"
    )
    add_model(parser)
    parser.add_argument("--size", type=int, default=512, help=f"side in pixels, 64 to {LARGEST_EMBEDDED}, default 512")
    parser.add_argument(
        "--repeat", type=int, default=REPEAT, help=f"timed calls of each after one to warm up, default {REPEAT}; the "
        "median counts"
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.set_defaults(run=run)
    plan.add(parser.add_subparsers(metavar="plan"))


def run(args) -> int:
    check_numbers(args, repeat=(1, 1000))
    check_size(args.size, 64, LARGEST_EMBEDDED)
    if args.json is not None:
        check_writable("--json", args.json)
    silence_libraries()
    from ..evaluation import results
    from ..micro import timing as bench
    from ..micro.editors import editor_named
    from ..micro.loading import identity

    rows = bench.presets_against_stock(args.size, args.repeat, model=args.model, **attention_here())
    calls = "one call, which may be noise" if args.repeat == 1 else f"median of {args.repeat} calls"
    print(f"embedded {args.model}, {args.size} x {args.size} px, {calls}, after one to warm up\n")
    print(f"{'preset':14}{'restore':11}{'edited':>8}{'seconds':>9}{'speedup':>9}{'FLOPs ratio':>13}{'quotient':>10}")
    for row in rows:
        quotient = row["speedup"] / row["flops_ratio"]
        print(
            f"{row['preset']:14}{row['restore']:11}{row['edit_fraction']:8.0%}{row['seconds']:9.2f}"
            f"{row['speedup']:8.2f}x{row['flops_ratio']:12.2f}x{quotient:10.2f}"
        )
    if rows and (steps := editor_named(args.model).default_steps) != STOCK_STEPS:
        best = max(row["flops_ratio"] for row in rows) * steps / STOCK_STEPS
        print(
            f"against {STOCK_STEPS} stock steps; of {steps}, the pipeline's default, FLOPs ratios are "
            f"{steps / STOCK_STEPS:.0%} of these, up to {best:.2f}x"
        )
    if args.json is not None:
        named = "" if args.model == EDITORS[0] else f" --model {args.model}"
        results.write(
            args.json, f"specedit bench{named} --size {args.size} --repeat {args.repeat}", rows, of=identity(args.model)
        )
        print(f"\nwrote {args.json}")
    return 0

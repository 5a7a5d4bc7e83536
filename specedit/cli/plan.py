"""`specedit bench plan`."""

from __future__ import annotations

import json
from pathlib import Path

from ..checks import share
from ..config import CHOICES, DEFAULT_PRESET, STOCK_STEPS, presets
from ..io.files import check_writable, write_text
from .bounds import check_numbers
from .errors import CLIError
from .shared import silence_libraries

SIDES = (64, 8192)  # px


def add(commands) -> None:
    parser = commands.add_parser("plan", help="predict a run of a real editor on a GPU, without the GPU")
    parser.add_argument("--gpu", default="H100", help="A100, H100, H200 or B200")
    parser.add_argument("--model", default="flux-kontext", help="a model's name, as flux-kontext or flux2-klein-9b")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets))
    parser.add_argument("--restore", choices=CHOICES["restore"], help="default: the preset's own")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--edited", type=float, default=20, help="percentage of the picture that is edited")
    parser.add_argument("--strength", type=float, default=1.0, help="of an inpainting call; below 1 there is no draft")
    parser.add_argument("--reference-refresh", type=int, metavar="R", help="run text and reference only every R steps")
    parser.add_argument(
        "--guidance-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigmas between which true guidance runs"
    )
    parser.add_argument(
        "--modulation", default="step", choices=CHOICES["modulation"], help="when scale, shift and gate are made"
    )
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=sorted(Path("benchmarks/results").glob("end_to_end*.json")),
        help="result files to compare with, by default those in benchmarks/results",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.set_defaults(run=run)


def run(args) -> int:
    check_numbers(args, height=SIDES, width=SIDES)
    if args.json is not None:
        check_writable("--json", args.json)
    silence_libraries()
    from ..config import resolve
    from ..cost import roofline

    config = resolve(
        args.preset, restore=args.restore or presets[args.preset].restore, reference_refresh=args.reference_refresh,
        guidance_range=args.guidance_range, modulation=args.modulation,
    )  # fmt: skip
    asked = (args.model, args.height, args.width, args.edited / 100, args.gpu)
    if not 0 <= args.edited <= 100:
        raise CLIError(f"--edited: expected percent, from 0 to 100, got {args.edited:g}")
    files = [_measured(path) for path in args.measured]
    predicted = roofline.predict_roofline(config, *asked, share("--strength", args.strength))
    row = roofline.measured_row(files, config, *asked) if args.strength == 1 else None
    seconds = {} if row is None else {stage["name"]: stage["seconds"] for stage in row["stages"]}
    print(
        f"{args.model}, {args.preset}, restore={config.restore}, {args.height} x {args.width}, {args.edited:g} % edited"
    )
    print(f"predicted for {args.gpu} ({roofline.GPUS[args.gpu].source}): roofline, a bound from below\n")
    print(f"{'stage':10}{'steps':>6}{'tokens':>8}{'TFLOPs':>10}{'GB':>9}{'seconds':>10}{'measured':>10}")
    for s in predicted["stages"]:
        tokens = f"{s['tokens']:,}" if s["steps"] else ""
        measured = f"{seconds[s['name']]:10.3f}" if s["name"] in seconds else f"{'-':>10}"
        print(
            f"{s['name']:10}{s['steps'] or '':>6}{tokens:>8}{s['flops'] / 1e12:10.2f}{s['bytes'] / 1e9:9.1f}"
            f"{s['seconds']:10.4f}{measured}"
        )
    against_50 = predicted | {name: predicted[f"{name}_50"] for name in ("flops_ratio", "clock_ratio")}
    lines = [("predicted", against_50)] + ([] if row is None else [("measured", row | {"clock_ratio": row["speedup"]})])
    print(f"\n{'':10}{'seconds':>9}{'stock':>9}{'FLOPs ratio':>13}{'clock ratio':>13}{'quotient':>10}")
    for name, r in lines:
        print(
            f"{name:10}{r['seconds']:9.3f}{r['seconds_stock']:9.3f}{r['flops_ratio']:12.2f}x{r['clock_ratio']:12.2f}x"
            f"{r['clock_ratio'] / r['flops_ratio']:10.2f}"
        )
    made = predicted["modulation"]
    print(
        f"\nmodulation: {made['weight_bytes'] / 1e9:.2f} GB of weights, read {made['reads']} times, or "
        f"{made['reads_once']} with modulation='once', which keeps {made['kept_bytes'] / 1e6:.1f} MB: "
        f"{made['bytes_less'] / 1e9:.1f} GB less"
    )
    steps = predicted["stock_steps"]
    if steps != STOCK_STEPS:
        default = f"the model's default of {steps}" if args.strength == 1 else f"stock's {steps} steps of this strength"
        print(
            f"\nThese are against {STOCK_STEPS} stock steps. Against {default}: "
            f"{predicted['flops_ratio']:.2f}x the FLOPs, {predicted['clock_ratio']:.2f}x the seconds"
        )
    if row is None:
        print("\nnot measured: no result file has this run on such a GPU")
    if args.json is not None:
        write_text(args.json, json.dumps(predicted, indent=1) + "\n")
        print(f"\nwrote {args.json}")
    return 0


def _measured(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        raise CLIError(f"--measured: expected a result file with machine and rows, got {path}")
    return content

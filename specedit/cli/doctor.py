"""`specedit doctor`."""

from __future__ import annotations

import json

from .errors import UNEXPECTED


def add(commands) -> None:
    parser = commands.add_parser("doctor", help="check and time on this machine what SpecEdit runs on")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
    parser.add_argument("--no-interpreter", action="store_true", help="without a GPU, leave out the kernels' check")
    parser.set_defaults(run=run)


def run(args) -> int:
    import warnings

    from ..doctor import examine
    from ..doctor_text import text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report
        report = examine(interpreter=not args.no_interpreter)
    print(json.dumps(report, indent=1) if args.json else text(report))
    return UNEXPECTED if report["problems"] else 0

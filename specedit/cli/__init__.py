"""The command line: `specedit demo | edit | app | batch | eval | bench | doctor`, one module per command.

Nothing imports torch before a command runs, so `--help` and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..versions import package_version
from . import app, batch, bench, demo, doctor, edit, errors, evaluate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line; argparse would print the usage too
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        """Unknown arguments are an error of the command's own parser, so the message names the command."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for errors that the user can fix, 1 for unexpected ones, 130 for Ctrl-C.

    `doctor` also returns 1 where something is wrong. With SPECEDIT_TRACEBACK set in the environment, errors are raised
    instead of printed.
    """
    parser = _Parser(
        prog="specedit",
        description="Fast diffusion image editing.",
        epilog="Errors are one line; SPECEDIT_TRACEBACK=1 in the environment shows the traceback.",
    )
    parser.add_argument("--version", action="version", version=f"specedit {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, edit, app, batch, evaluate, bench, doctor):
        command.add(commands)
    args = parser.parse_args(arguments)
    try:
        with errors.one_line_warnings():
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `specedit ... | head`
        errors.close_output()
        return errors.PIPE
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(errors.TRACEBACK, "") not in ("", "0"):
            raise
        line, code = errors.explain(error, args)
        print(f"specedit: {line}", file=sys.stderr)
        return code

"""The command line: `specedit demo | edit | eval | bench`, a module for each command.

Nothing here imports torch before a command runs, so that `--help` and wrong usage are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..versions import package_version
from . import bench, demo, edit, errors, evaluate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse itself prints the usage too, which takes several lines
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        """Of a command's parser too: what it does not know is an error that names the command, not `specedit`."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for what the user can mend, 1 for what nobody expected, 130 for Ctrl-C.

    With SPECEDIT_TRACEBACK set in the environment errors are raised instead of printed.
    """
    parser = _Parser(
        prog="specedit",
        description="Fast diffusion image editing.",
        epilog="Errors are one line; with SPECEDIT_TRACEBACK=1 in the environment they come with their traceback.",
    )
    parser.add_argument("--version", action="version", version=f"specedit {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, edit, evaluate, bench):
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
